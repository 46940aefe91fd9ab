"""Workflows of several prunings: passes with tuning in between, sweeps, sensitivity."""
