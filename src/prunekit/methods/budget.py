"""Budgets: how much to remove, and how many removals in a fixed order meet that."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prunekit.errors import InputError
from prunekit.methods.base import Config

if TYPE_CHECKING:
    from prunekit.surgery import Cost

Kind = Literal["ratio", "macs", "params"]

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
_AMOUNT = re.compile(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(%|[KMG]?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A budget: a share of channels to remove, or an amount of MACs or parameters to keep."""

    kind: Kind
    amount: float

    def met_by(self, cost: Cost) -> bool:
        """Return whether a network of that cost is within the amount (not for ratios)."""
        return self.spent(cost) <= self.amount

    def spent(self, cost: Cost) -> int:
        """Return the MACs or parameters of a network of that cost (not for ratios)."""
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
    return Budget("params", read_amount("--target-params", config.target_params, now.params))


def check_budget(config: Config) -> str:
    """Return the name of the one setting that says how much to remove, as far as it can be checked without a network.

    Raises:
        InputError: None or several are given, or the one given makes no sense.
    """
    given = [name for name in ("ratio", "target_macs", "target_params") if getattr(config, name) is not None]
    if len(given) != 1:
        said = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
        raise InputError(
            f"exactly one of --ratio, --target-macs and --target-params is needed; found {said}",
            hint="for example --ratio 0.5 to remove half of the channels",
        )
    name, value = given[0], getattr(config, given[0])
    if name == "ratio" and not isinstance(value, Mapping):
        check_ratio(value)
    elif name != "ratio":
        check_amount(f"--{name.replace('_', '-')}", value)
    return name


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


def fewest_to_meet(
    budget: Budget, limit: int, cost_at: Callable[[int], Cost], further: Callable[[], str | None] | None = None
) -> int:
    """Return the smallest number of steps, `limit` at most, whose network meets a target.

    Args:
        budget: The target, in MACs or parameters.
        limit: All steps that there are.
        cost_at: The cost of what is left after so many steps; it must not rise.
        further: What to do where these steps are not enough, asked only then.

    Raises:
        InputError: Even the last step leaves more.
    """
    count = fewest(limit, lambda k: budget.met_by(cost_at(k)))
    left = cost_at(count)
    if not budget.met_by(left):
        what = "MACs" if budget.kind == "macs" else "parameters"
        raise InputError(
            f"the target of {budget.amount:,.0f} {what} cannot be met: "
            f"removing all that may go leaves {budget.spent(left):,}",
            hint=further() if further else None,
        )
    return count


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
