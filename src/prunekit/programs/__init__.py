"""Exported programs (`.pt2`), read without running any of their code."""
