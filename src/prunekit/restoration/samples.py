"""Inputs and outputs of a layer at a sample of positions, as the rows of a regression."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1 << 24  # numbers of the input that are unfolded at a time


@dataclass(frozen=True)
class LayerCall:
    """A convolution or a product of matrices as it ran: what it read, and how.

    `x` is `(N, channels, ...)` for a convolution, and `(rows, inputs)` for a product, which has no `stride` and the
    like. `weight` is `(outputs, inputs of a group, taps ...)`.
    """

    x: Tensor
    weight: Tensor
    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 1

    @classmethod
    def of(cls, op: str, args: Sequence[Any]) -> LayerCall:
        """Return a call, from the arguments of a `convolution`, `addmm` or `mm`."""
        if op == "convolution":
            return cls(args[0], args[1], args[3], args[4], args[5], args[8])
        x, matrix = args[-2:] if op == "mm" else args[1:3]
        return cls(x, matrix.t())


def rows_of(output: Tensor) -> int:
    """Return how many output vectors a layer gave: of a convolution `(N, C, ...)` one for each image and place."""
    return output.numel() // max(1, output.size(1))


def positions(total: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Return at most `wanted` of a layer's `total` output vectors, ascending: one drawn from each equal stretch."""
    if total <= wanted:
        return torch.arange(total)
    draws = torch.rand(wanted, generator=generator, dtype=torch.float64)
    return ((torch.arange(wanted) + draws) * (total / wanted)).long().clamp_(max=total - 1)


def outputs_at(output: Tensor, where: Tensor) -> Tensor:
    """Return the output `(N, C, ...)` at `positions`: `(rows, C)`."""
    flat, where = output.flatten(2) if output.dim() > 2 else output[:, :, None], where.to(output.device)
    return flat[where // flat.size(2), :, where % flat.size(2)]


def inputs_at(call: LayerCall, where: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the inputs that make the output at `positions`, a slice of them at a time: `(groups, inputs, n)`.

    The order of the inputs is that of the layer's flattened weights: channels of the group, then kernel taps.
    """
    where = where.to(call.x.device)
    step = max(64, _CHUNK // (call.weight[0].numel() * call.groups))
    for start in range(0, len(where), step):
        rows = slice(start, start + step)
        if call.stride:
            patches = _patches(call, where[rows])  # (n, taps, channels)
            yield (
                rows,
                patches.reshape(*patches.shape[:2], call.groups, -1).permute(2, 3, 1, 0).flatten(1, 2).contiguous(),
            )
        else:
            yield rows, call.x[where[rows]].t().unsqueeze(0)


def _patches(call: LayerCall, where: Tensor) -> Tensor:
    """Return what the kernel sees at each output position: `(n, taps, channels)`."""
    kernel = call.weight.shape[2:]
    sizes = zip(call.x.shape[2:], call.padding, kernel, call.dilation, call.stride, strict=True)
    shape = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, k, d, t in sizes]
    image, place = where // math.prod(shape), where % math.prod(shape)
    first, last = int(image[0]), int(image[-1])  # positions ascend: only these images need padding
    near = F.pad(call.x[first : last + 1], [n for pad in reversed(call.padding) for n in (pad, pad)])
    index = torch.zeros(len(where), 1, dtype=torch.int64, device=where.device)
    for axis, along in enumerate(_unravel(place, shape)):
        taps = torch.arange(kernel[axis], device=where.device) * call.dilation[axis]
        at = along[:, None] * call.stride[axis] + taps  # (n, kernel size of the axis)
        index = (index[:, :, None] * near.size(2 + axis) + at[:, None, :]).flatten(1)
    return near.flatten(2)[(image - first)[:, None], :, index]


def _unravel(place: Tensor, shape: list[int]) -> list[Tensor]:
    along = []
    for size in reversed(shape):
        along.append(place % size)
        place = place // size
    return along[::-1]
