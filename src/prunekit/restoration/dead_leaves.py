"""Dead leaves: pictures of occluding shapes whose sizes follow a power law, with the second-order statistics of nature.

A sound is a picture of one line; a volume, or a clip, is made of shapes with a depth.

Source: Lee, Mumford and Huang, "Occlusion models for natural images" (IJCV 2001).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prunekit.progress import counter

_LEAVES = 160
_COMMON = 0.9  # share of a leaf's brightness that all colour channels have in common
_SMALLEST = 1.5  # pixels
_LARGEST = 0.6  # of the picture's longer side
_SHADING = 0.5
_PAINTED = 50  # pictures at a time


def dead_leaves(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return `count` pictures `(count, *shape)`, each colour channel of mean 0 and variance 1 over all of them.

    `shape` is `(C, H, W)`, of sounds `(C, L)`, of volumes `(C, D, H, W)`. Leaves are shaded ellipses and boxes; the
    density of radii falls as `r^-3`, which makes the pictures look the same at every scale.
    """
    channels, *sizes = shape
    depth, height, width = (*(1,) * (3 - len(sizes)), *sizes)
    places = _Places.of(depth, height, width)
    pictures = _colours(count, channels, generator).expand(count, channels, depth, height, width).clone()
    paint = counter("making images")
    for leaves in range(_LEAVES):
        paint(leaves, _LEAVES)
        leaf = _Leaf.drawn(count, (channels, depth, height, width), generator)
        for start in range(0, count, _PAINTED):
            part = slice(start, start + _PAINTED)
            _paint(pictures[part], leaf.of(part), places)
    variance, mean = torch.var_mean(pictures, (0, 2, 3, 4), correction=0, keepdim=True)
    return pictures.sub_(mean).div_(variance.sqrt().clamp_min(1e-6)).reshape(count, *shape)


class _Places(NamedTuple):
    """Coordinates of the pixels along each axis, `(1, D, 1, 1)`, `(1, 1, H, 1)` and `(1, 1, 1, W)`."""

    z: Tensor
    y: Tensor
    x: Tensor

    @classmethod
    def of(cls, depth: int, height: int, width: int) -> _Places:
        """Return those of pictures of this size."""
        z, y, x = (torch.arange(size, dtype=torch.float32) for size in (depth, height, width))
        return cls(z[None, :, None, None], y[None, None, :, None], x[None, None, None, :])


class _Leaf(NamedTuple):
    """One leaf for each picture: colours `(N, C, 1, 1, 1)`, and all else `(N, 1, 1, 1)`.

    `slope` is how its brightness changes along its first axis; `radius` is in pixels, that axis times `stretch`.
    """

    box: Tensor
    slope: Tensor
    colours: Tensor
    radius: Tensor
    stretch: Tensor
    angle: Tensor
    top: Tensor
    left: Tensor
    front: Tensor

    @classmethod
    def drawn(cls, count: int, shape: tuple[int, int, int, int], generator: torch.Generator) -> _Leaf:
        """Return leaves at random."""

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator)[:, None, None, None]

        def normal() -> Tensor:
            return torch.randn(count, generator=generator)[:, None, None, None]

        channels, depth, height, width = shape
        largest = max(2 * _SMALLEST, _LARGEST * max(height, width))
        radius = (_SMALLEST**-2 + uniform() * (largest**-2 - _SMALLEST**-2)) ** -0.5
        stretch = torch.exp(0.5 * normal())
        angle = math.pi * uniform()
        top, left = ((1.2 * uniform() - 0.1) * size for size in (height, width))
        box, slope = uniform() < 0.5, _SHADING * normal()
        colours = _colours(count, channels, generator)
        front = (1.2 * uniform() - 0.1) * depth if depth > 1 else torch.zeros_like(top)
        return cls(box, slope, colours, radius, stretch, angle, top, left, front)

    def of(self, part: slice) -> _Leaf:
        """Return the leaves of some of the pictures."""
        return _Leaf(*(values[part] for values in self))


def _paint(pictures: Tensor, leaf: _Leaf, places: _Places) -> None:
    """Paint a leaf into each of `pictures`, **in place**."""
    back, down, right = (places.z - leaf.front) / leaf.radius, places.y - leaf.top, places.x - leaf.left
    sine, cosine = leaf.angle.sin(), leaf.angle.cos()
    across = (right * cosine + down * sine) / (leaf.radius * leaf.stretch)  # in radii
    along = (down * cosine - right * sine) / (leaf.radius / leaf.stretch)
    box = torch.maximum(torch.maximum(across.abs(), along.abs()), back.abs()) <= 0.9
    inside = torch.where(leaf.box, box, across**2 + along**2 + back**2 <= 1)
    shade = (leaf.slope * across).clamp(-1, 1).unsqueeze(1)
    pictures.copy_(torch.where(inside.unsqueeze(1), leaf.colours + shade, pictures))


def _colours(count: int, channels: int, generator: torch.Generator) -> Tensor:
    grey = torch.randn(count, 1, generator=generator)
    own = torch.randn(count, channels, generator=generator)
    return (math.sqrt(_COMMON) * grey + math.sqrt(1 - _COMMON) * own)[:, :, None, None, None]
