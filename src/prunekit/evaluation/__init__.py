"""Evaluation of a network: its accuracy, its cost and its measured speed."""
