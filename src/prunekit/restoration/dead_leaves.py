"""Dead leaves: pictures of occluding shapes whose sizes follow a power law, with the second-order statistics of nature.

Source: Lee, Mumford and Huang, "Occlusion models for natural images" (IJCV 2001).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunekit.progress import counter

_LEAVES = 160
_COMMON = 0.9  # share of a leaf's brightness that all colour channels have in common
_SMALLEST = 1.5  # pixels
_LARGEST = 0.6  # of the picture's longer side
_SHADING = 0.5


def dead_leaves(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return `count` pictures `(count, C, H, W)`, each colour channel of mean 0 and variance 1 over all of them.

    Leaves are shaded ellipses and boxes; the density of radii falls as `r^-3`, which makes the pictures look the same
    at every scale.
    """
    channels, height, width = shape
    y = torch.arange(height, dtype=torch.float32)[None, :, None]
    x = torch.arange(width, dtype=torch.float32)[None, None, :]
    pictures = _colours(count, channels, generator).expand(count, *shape).clone()
    paint = counter("making images")
    for leaves in range(_LEAVES):
        paint(leaves, _LEAVES)
        across, along = _place(y, x, count, max(height, width), generator)
        box = (torch.rand(count, generator=generator) < 0.5)[:, None, None]
        inside = torch.where(box, torch.maximum(across.abs(), along.abs()) <= 0.9, across**2 + along**2 <= 1)
        slope = _SHADING * torch.randn(count, generator=generator)[:, None, None]
        leaf = _colours(count, channels, generator) + (slope * across).clamp(-1, 1).unsqueeze(1)
        pictures = torch.where(inside.unsqueeze(1), leaf, pictures)
    centred = pictures - pictures.mean((0, 2, 3), keepdim=True)
    return centred / centred.square().mean((0, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)


def _colours(count: int, channels: int, generator: torch.Generator) -> Tensor:
    grey = torch.randn(count, 1, generator=generator)
    own = torch.randn(count, channels, generator=generator)
    return (math.sqrt(_COMMON) * grey + math.sqrt(1 - _COMMON) * own)[:, :, None, None]


def _place(y: Tensor, x: Tensor, count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return coordinates of every pixel along a leaf's two axes, in its radii: `(count, H, W)` each."""

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)[:, None, None]

    largest = max(2 * _SMALLEST, _LARGEST * side)
    radius = (_SMALLEST**-2 + uniform() * (largest**-2 - _SMALLEST**-2)) ** -0.5
    stretch = torch.exp(0.5 * torch.randn(count, generator=generator))[:, None, None]
    angle = math.pi * uniform()
    down, right = y - (1.2 * uniform() - 0.1) * y.numel(), x - (1.2 * uniform() - 0.1) * x.numel()
    across = (right * angle.cos() + down * angle.sin()) / (radius * stretch)
    return across, (down * angle.cos() - right * angle.sin()) / (radius / stretch)
