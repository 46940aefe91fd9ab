"""The operations that surgery knows by name: norms, and those that read channels through a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BATCH_NORMS = (
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)


def is_batch_norm(op: str) -> bool:
    """Whether a recorded op is batch normalisation, on whatever device it ran."""
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
    """How an op reads each of its operands through the other, by `op_name` and arguments; none for other ops."""
    yield from _READINGS.get(op, _none)(args)


def _none(_: Sequence[Any]) -> Iterator[Reading]:
    return iter(())


def _convolution(args: Sequence[Any]) -> Iterator[Reading]:
    transposed = bool(args[6])
    yield Reading(0, 1, 1, 0 if transposed else 1)


def _product(first: int, batched: int) -> Callable[[Sequence[Any]], Iterator[Reading]]:
    """A product of matrices, of which either may be the weight."""

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
    """What an op that reads through a weight adds to its result, if it adds something."""
    place = {"convolution": 2, "addmm": 0, "baddbmm": 0}.get(op)
    bias = None if place is None else args[place]
    return bias if isinstance(bias, Tensor) else None
