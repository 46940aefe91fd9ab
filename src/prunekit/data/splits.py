"""Deterministic, stratified splits: the same images for everybody, every time, with no random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.errors import InputError


def every(labels: Tensor, tenths: frozenset[int]) -> Tensor:
    """Return the ascending indices of the images whose position within their class, modulo ten, is in `tenths`."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        wanted = torch.tensor([k % 10 in tenths for k in range(len(members))], dtype=torch.bool)
        chosen[members[wanted]] = True
    return chosen.nonzero().flatten()


LEFT_OUT = frozenset({9})
"""What `held_out` leaves out for validation, of each ten images of a class."""


def held_out(labels: Tensor, split: str, *, name: str) -> Tensor:
    """Return the indices of "train" or "val" of a set without validation images: "val" is every tenth of each class."""
    chosen = every(labels, LEFT_OUT if split == "val" else frozenset(range(10)) - LEFT_OUT)
    if not len(chosen):
        raise InputError(
            f"{name} has fewer than ten images in every class, too few to hold some out for validation",
            hint="put validation images into a folder val/ beside train/",
        )
    return chosen
