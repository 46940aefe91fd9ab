"""The operations that surgery knows by name: one list of families, and those that read channels through a weight.

Names are those of `op_name`: `add` stands for `aten::add_.Tensor` too. A family says one thing of its members; who
needs several joins them. The tables of rules, which say what each op does, stay where their rules are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# The ops of convolutions and linear layers; products of two activations (`bmm`) are none.
LAYER_OPS = ("convolution", "addmm", "mm")
BATCH_NORMS = (
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
NORMS = (*BATCH_NORMS, "native_layer_norm", "native_group_norm")

# The same elements in the same order: as another shape, or as they are.
RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias")
COPIES = ("alias", "detach", "clone", "contiguous")
# Other names and geometry for the elements of a tensor, all of them; also what is done to a weight before it is used.
VIEWS = frozenset((*RESHAPES, "t", "transpose", "permute", "squeeze", "unsqueeze", "alias", "detach"))
# What hands on every element as it is, when a network is not training.
HAND_ON = VIEWS | {*COPIES, "_to_copy", "native_dropout"}

# Averages of whole windows give a constant back; those of `AVERAGE_POOLS` may count padding, which changes it.
ADAPTIVE_AVERAGE_POOLS = ("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
AVERAGE_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
MAX_POOLS = ("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")
POOLS = (*ADAPTIVE_AVERAGE_POOLS, *AVERAGE_POOLS, *MAX_POOLS)
NEAREST_UPSAMPLES = ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d")
# Channels become positions or positions channels, and nothing else happens.
SHUFFLES = ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "col2im")

# Activations f with f(0) = 0.
ZERO_ACTIVATIONS = (
    *("relu", "hardtanh", "hardswish", "silu", "gelu", "leaky_relu", "elu", "tanh", "mish", "celu", "selu"),
)

# Ops f of which each channel's f(0) = 0.
ZERO_STAYS = HAND_ON | {*ZERO_ACTIVATIONS, *POOLS, *NEAREST_UPSAMPLES, "mean", "sum", "slice"}
# Ops that give a constant back as it is, and work on each channel alike and linearly.
CONSTANT_STAYS = HAND_ON | {*ADAPTIVE_AVERAGE_POOLS, *NEAREST_UPSAMPLES, "mean", "slice"}
# Ops f with f(s x) = s f(x) for every s >= 0.
HOMOGENEOUS = CONSTANT_STAYS | {*AVERAGE_POOLS, *MAX_POOLS, *SHUFFLES, "cat", "relu", "leaky_relu", "sum", "amax"}


def is_batch_norm(op: str) -> bool:
    """Return whether a recorded op is batch normalisation, on whatever device it ran."""
    return op in BATCH_NORMS


@dataclass(frozen=True)
class Reading:
    """An activation whose dimension `channels` an op sums over, against dimension `into` of a weight.

    `activation` and `weight` are positions among the op's arguments. A grouped convolution sums over stretches of
    `channels`, each as long as `into`.
    """

    activation: int
    channels: int
    weight: int
    into: int


def readings(op: str, args: Sequence[Any]) -> Iterator[Reading]:
    """Yield how an op reads each of its operands through the other, by `op_name` and arguments; none for other ops."""
    yield from _READINGS.get(op, _none)(args)


def _none(_: Sequence[Any]) -> Iterator[Reading]:
    return iter(())


def _convolution(args: Sequence[Any]) -> Iterator[Reading]:
    transposed = bool(args[6])
    yield Reading(0, 1, 1, 0 if transposed else 1)


def _product(first: int, batched: int) -> Callable[[Sequence[Any]], Iterator[Reading]]:
    """Return the reading of a product of matrices, of which either may be the weight."""

    def read(_: Sequence[Any]) -> Iterator[Reading]:
        row, column = batched, batched + 1
        yield Reading(first, column, first + 1, row)
        yield Reading(first + 1, row, first, column)

    return read


_READINGS: dict[str, Callable[[Sequence[Any]], Iterator[Reading]]] = {
    "convolution": _convolution,
    "mm": _product(0, 0),
    "addmm": _product(1, 0),
    "bmm": _product(0, 1),
    "baddbmm": _product(1, 1),
}


def bias_of(op: str, args: Sequence[Any]) -> Tensor | None:
    """Return what an op that reads through a weight adds to its result, if it adds something."""
    place = {"convolution": 2, "addmm": 0, "baddbmm": 0}.get(op)
    bias = None if place is None else args[place]
    return bias if isinstance(bias, Tensor) else None
