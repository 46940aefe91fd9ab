"""What keeps work from being resumed: settings other than those that it began with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def differing(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str], *, length: int) -> str:
    """Return the settings of `keys` that are not the same, each with both values, cut to `length`; or nothing."""

    def shown(value: Any) -> str:
        return "none" if value is None else f"{value}"[:length]

    return " and ".join(
        f"{key.replace('tuning.', '').replace('_', ' ')} ({shown(before.get(key))} there, {shown(now.get(key))} now)"
        for key in keys
        if before.get(key) != now.get(key)
    )
