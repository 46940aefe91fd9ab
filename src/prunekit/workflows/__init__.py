"""What takes several prunings: passes with tuning between them, sweeps, sensitivity."""
