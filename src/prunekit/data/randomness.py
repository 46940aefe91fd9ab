"""Random numbers that depend on a key alone: a run resumes anywhere without a saved generator."""

from __future__ import annotations

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """Return a well-mixed 63-bit seed for non-negative numbers, such as `(seed, epoch, step)`."""
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(1))


def seeded(*key: int) -> torch.Generator:
    """Return a CPU generator that depends on `key` alone."""
    return torch.Generator().manual_seed(seed_of(*key))
