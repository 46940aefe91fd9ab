"""Narrower heads of attention by the joint low rank of their projections, in closed form and without data."""
