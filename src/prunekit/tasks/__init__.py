"""What a network is for: its examples, its loss and its score (`base.py` has the contract)."""
