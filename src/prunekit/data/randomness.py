"""Random numbers addressed by what they are for: a run goes on from anywhere without a saved generator."""

from __future__ import annotations

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """One well-mixed 63-bit seed for a tuple of non-negative numbers, such as `(seed, epoch, step)`."""
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(1))


def seeded(*key: int) -> torch.Generator:
    """A CPU generator that depends on `key` alone."""
    return torch.Generator().manual_seed(seed_of(*key))
