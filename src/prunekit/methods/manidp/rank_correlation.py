"""Rank correlation: what is said of many images at once."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each of `(N,)` values, from 0; equal values share the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    middle: Tensor = last - (counts.double() + 1) / 2
    return middle[place]


def spearman(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two `(N,)` series; 0 where one of them is constant."""
    both = torch.stack([ranks(a), ranks(b)])
    centred = both - both.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    return float(centred[0] @ centred[1] / norms.prod()) if bool(norms.all()) else 0.0
