"""Whether a smaller network computes what was meant."""
