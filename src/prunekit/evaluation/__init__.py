"""What a network is worth: its scores, its cost and its measured speed."""
