"""What a layer reads and writes at a sample of positions, as the rows of a regression."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

_CHUNK = 1 << 22  # numbers of the input that are unfolded at a time


def positions(output: Tensor, layer: Layer, wanted: int, generator: torch.Generator) -> Tensor:
    """At most `wanted` positions of a layer's output, ascending: one drawn from each of as many equal stretches.

    A convolution's output `(N, C, ...)` has one for each image and place, a linear layer's `(..., C)` one for each
    vector.
    """
    total = output.numel() // max(1, output.size(-1 if isinstance(layer, nn.Linear) else 1))
    if total <= wanted:
        return torch.arange(total, device=output.device)
    draws = torch.rand(wanted, generator=generator, dtype=torch.float64)
    return ((torch.arange(wanted) + draws) * (total / wanted)).long().clamp_(max=total - 1).to(output.device)


def outputs_at(output: Tensor, layer: Layer, where: Tensor) -> Tensor:
    """`(rows, C)`: the output at `positions`."""
    if isinstance(layer, nn.Linear):
        return output.reshape(-1, output.size(-1))[where]
    flat = output.flatten(2)
    return flat[where // flat.size(2), :, where % flat.size(2)]


def inputs_at(x: Tensor, layer: Layer, where: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The inputs that make the output at `positions`, a slice of them at a time: `(groups, n, inputs)`.

    The order of the inputs is that of the layer's flattened weights: channels of the group, then kernel taps.
    """
    groups = getattr(layer, "groups", 1)
    step = max(64, _CHUNK // (layer.weight[0].numel() * groups))
    for start in range(0, len(where), step):
        rows = slice(start, start + step)
        if isinstance(layer, nn.Linear):
            yield rows, x.reshape(-1, x.size(-1))[where[rows]].unsqueeze(0)
        else:
            patches = _patches(x, layer, where[rows])  # (n, taps, channels)
            yield rows, patches.reshape(*patches.shape[:2], groups, -1).permute(2, 0, 3, 1).flatten(2)


def _patches(x: Tensor, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, where: Tensor) -> Tensor:
    """What the kernel sees at each output position: `(n, taps, channels)`."""
    before, after = _padding(conv)
    sizes = zip(x.shape[2:], before, after, conv.kernel_size, conv.dilation, conv.stride, strict=True)
    shape = [(s + b + a - d * (k - 1) - 1) // t + 1 for s, b, a, k, d, t in sizes]
    image, place = where // math.prod(shape), where % math.prod(shape)
    first, last = int(image[0]), int(image[-1])  # positions ascend: only these images need padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    pads = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    near = F.pad(x[first : last + 1], pads, mode=mode)
    index = torch.zeros(len(where), 1, dtype=torch.int64, device=x.device)
    for axis, along in enumerate(_unravel(place, shape)):
        taps = torch.arange(conv.kernel_size[axis], device=x.device) * conv.dilation[axis]
        at = along[:, None] * conv.stride[axis] + taps  # (n, kernel size of the axis)
        index = (index[:, :, None] * near.size(2 + axis) + at[:, None, :]).flatten(1)
    return near.flatten(2)[(image - first)[:, None], :, index]


def _padding(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[list[int], list[int]]:
    """Padding before and after, for each axis; "same" puts the odd one after."""
    if isinstance(conv.padding, str):
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        spans = reach if conv.padding == "same" else [0] * len(reach)
        return [span // 2 for span in spans], [span - span // 2 for span in spans]
    return list(conv.padding), list(conv.padding)


def _unravel(place: Tensor, shape: list[int]) -> list[Tensor]:
    along = []
    for size in reversed(shape):
        along.append(place % size)
        place = place // size
    return along[::-1]
