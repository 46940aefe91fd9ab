"""Exported programs (`.pt2`), read without running any code of theirs."""
