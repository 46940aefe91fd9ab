"""One module per command: each has a `COMMAND`, and imports torch only when it runs."""
