"""The goal of a latency: read from text, held against a model of time and against the clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunekit.errors import InputError

if TYPE_CHECKING:
    from prunekit.surgery import Graph
    from prunekit.surgery.graph.labels import Mask

Keeps = Mapping[str, Sequence[int]]

_UNITS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?\d+)?)\s*(%|us|µs|ms|s)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class LatencyGoal:
    """A latency to come down to, and how to tell what a network takes. `target_latency` becomes one before planning.

    Attributes:
        amount: The goal in milliseconds.
        present: What the network takes now, as measured.
        predict: The milliseconds of each layer, and of what else there is, with the kept channel classes of a graph.
        measure: The milliseconds of the network with the kept units, plainly pruned and timed.
        block: Channels that kernels work on at once: the last block of a layer may as well be full.
        conditions: What they hold for, in words.
    """

    amount: float
    present: float
    predict: Callable[[Graph, Mask], Mapping[str, float]]
    measure: Callable[[Keeps], float]
    block: int = 1
    conditions: str = ""


def read_latency(text: object) -> tuple[float, str]:
    """Return the number and the unit, `%` or `ms`, of a latency such as `5ms` or `60%`.

    Raises:
        InputError: It is none, has no unit, or is out of range.
    """
    match = _AMOUNT.fullmatch(str(text))
    if match is None:
        raise InputError(
            f"--target-latency takes a time like 5ms, or a share of the present one like 60%; found '{text}'"
        )
    number, unit = float(match[1]), (match[2] or "").lower()
    if not unit:
        share = f"{100 * number:g}%" if number < 1 else f"{number:g}%"
        raise InputError(
            f"--target-latency {text} has no unit",
            hint=f"did you mean {number:g}ms, or {share} of the present latency?",
        )
    if unit == "%" and not 0 < number < 100:
        raise InputError(f"--target-latency {text}: the share of the present latency must lie between 0 and 100%")
    if number <= 0:
        raise InputError(f"--target-latency {text}: no network answers in no time", hint="give a time like 5ms")
    return (number, "%") if unit == "%" else (number * _UNITS[unit], "ms")


def latency_within(text: object, present: float) -> float:
    """Return the milliseconds that `text` asks for where the network takes `present` now.

    Raises:
        InputError: It is no latency below the present one.
    """
    number, unit = read_latency(text)
    amount = present * number / 100 if unit == "%" else number
    if amount >= present:
        raise InputError(
            f"--target-latency {text}: the network already takes {present:.3g} ms",
            hint="give a shorter time, or a share of the present one such as 60%",
        )
    return amount
