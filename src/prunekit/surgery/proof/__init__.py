"""Proof that a smaller network computes what was meant."""
