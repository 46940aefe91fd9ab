"""Budgets: how much to remove, and how many removals in a fixed order meet that."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prunekit.errors import InputError
from prunekit.methods.base import Config
from prunekit.methods.goal import LatencyGoal, read_latency

if TYPE_CHECKING:
    from prunekit.surgery import Cost, Graph
    from prunekit.surgery.graph.labels import Mask

Kind = Literal["ratio", "macs", "params", "latency"]

AXES = ("ratio", "target_macs", "target_params", "target_latency")
"""Ways of saying how much is to go: settings that every method has, of which exactly one is given."""

_FLAGS = tuple(f"--{name.replace('_', '-')}" for name in AXES)

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
_AMOUNT = re.compile(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(%|[KMG]?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A budget: a share of channels to remove, or an amount of MACs, parameters or milliseconds to keep.

    That of a latency has a `goal`, which knows what networks take.
    """

    kind: Kind
    amount: float
    goal: LatencyGoal | None = None

    def spent(self, graph: Graph, kept: Mask, biases: Collection[str] = ()) -> float:
        """Return what a network with the `kept` classes takes of this budget's kind (not for ratios).

        `biases` names the layers that get a bias on the way.
        """
        from prunekit.surgery import predict

        if self.goal is not None:
            return sum(self.goal.predict(graph, kept).values())
        cost = predict(graph, kept, biases)
        return cost.macs if self.kind == "macs" else cost.params


def read_budget(config: Config, now: Cost) -> Budget:
    """Return the one budget that `config` names; percentages are of the network's present cost.

    Raises:
        InputError: None or several are given, or one is out of range.
    """
    given = check_budget(config)
    if given == "ratio":
        return Budget("ratio", check_ratio(config.ratio))
    if given == "target_macs":
        return Budget("macs", read_amount("--target-macs", config.target_macs, now.macs))
    if given == "target_params":
        return Budget("params", read_amount("--target-params", config.target_params, now.params))
    goal = config.target_latency
    if not isinstance(goal, LatencyGoal):
        raise InputError(
            "a latency is a goal only where the network can be timed",
            hint="prunekit.prune, slim and merge do that; a method's own plan() does not",
        )
    return Budget("latency", goal.amount, goal)


def has_budget(config: Config) -> bool:
    """Return whether something is said of how much all layers lose together, not only of some by their names."""
    return any(getattr(config, name) is not None for name in AXES) and not isinstance(config.ratio, Mapping)


def check_budget(config: Config) -> str:
    """Return the name of the one setting that says how much to remove, as far as it can be checked without a network.

    That is `ratio_of` where ratios of single layers are all that is said.

    Raises:
        InputError: None or several are given, or the one given makes no sense.
    """
    given = [name for name in AXES if getattr(config, name) is not None]
    for ratio in (config.ratio_of or {}).values():
        check_ratio(ratio)
    if not given and config.ratio_of:
        return "ratio_of"
    if len(given) != 1:
        said = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
        raise InputError(
            f"exactly one of {', '.join(_FLAGS[:-1])} and {_FLAGS[-1]} is needed; found {said}",
            hint="for example --ratio 0.5 to remove half of the channels",
        )
    name, value = given[0], getattr(config, given[0])
    _check_latency_settings(config, name)
    if name == "ratio" and not isinstance(value, Mapping):
        check_ratio(value)
    elif name == "target_latency":
        if not isinstance(value, LatencyGoal):
            read_latency(value)
    elif name != "ratio":
        check_amount(f"--{name.replace('_', '-')}", value)
    return name


def _check_latency_settings(config: Config, given: str) -> None:
    """Raise `InputError` for settings of a latency where none is the goal."""
    names = ("latency_on", "latency_batch", "latency_threads")
    extra = [f"--{name.replace('_', '-')}" for name in names if getattr(config, name) is not None]
    if extra and given != "target_latency":
        raise InputError(
            f"{' and '.join(extra)} says how a latency is measured, and the goal is another one",
            hint=f"take --target-latency in the place of --{given.replace('_', '-')}, or leave it out",
        )


def check_ratio(ratio: object) -> float:
    """Return a ratio strictly between 0 and 1.

    Raises:
        InputError: It is not.
    """
    if not isinstance(ratio, int | float) or not 0 < ratio < 1:
        percent = isinstance(ratio, int | float) and 1 <= ratio < 100
        hint = f"write {ratio:g}% to remove {ratio:g} of a hundred channels" if percent else None
        raise InputError(f"a ratio must lie between 0 and 1, both excluded; found {ratio}", hint=hint)
    return float(ratio)


def read_amount(flag: str, value: str | float | None, now: int) -> float:
    """Parse an amount such as `50%` of `now`, `20M` or `1.5G`, between 0 and `now`.

    Raises:
        InputError: It is no amount, or out of range.
    """
    number, unit = _parsed(flag, value)
    amount = now * number / 100 if unit == "%" else number * _UNITS[unit]
    if not 0 < amount < now:
        raise InputError(f"{flag} {value} is {amount:,.0f}; it must lie between 0 and the present {now:,}")
    return amount


def check_amount(flag: str, value: str | float | None) -> None:
    """Raise `InputError` for what is no amount, or a share that is none, as far as that shows without a network."""
    _parsed(flag, value)


def _parsed(flag: str, value: str | float | None) -> tuple[float, str]:
    """Return the number and the unit of an amount.

    Raises:
        InputError: It is none, or text that is too small to be anything but a percentage.
    """
    match = _AMOUNT.fullmatch(str(value))
    try:
        number, unit = float(match[1]), match[2].upper()  # type: ignore[index]
    except (TypeError, ValueError):
        raise InputError(f"{flag} takes an amount like 50%, 20M or 1.5G; found '{value}'") from None
    if unit == "%" and not 0 < number < 100:
        raise InputError(f"{flag} {value}: the share to keep must lie between 0 and 100%")
    if isinstance(value, str) and not unit and number <= 100:
        share = f"{100 * number:g}%" if number < 1 else f"{number:g}%"
        what = "MACs" if "macs" in flag else "parameters"
        raise InputError(f"{flag} {value} would leave {number:g} {what}", hint=f"did you mean {flag} {share}?")
    return number, unit


def fewest(limit: int, enough: Callable[[int], bool]) -> int:
    """Return the smallest `k` in `[0, limit]` with `enough(k)`, which must be monotonic; `limit` if there is none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low
