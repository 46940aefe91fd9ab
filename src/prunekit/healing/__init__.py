"""Healing: a pruned network comes back to what its original computed, without labels, in minutes."""
