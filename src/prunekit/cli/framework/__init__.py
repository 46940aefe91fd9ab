"""Construction of commands: options from dataclasses, settings from files, events of a run."""
