"""Times as people write them."""

from __future__ import annotations

import re

from prunekit.errors import InputError

_TIME = re.compile(r"\s*([0-9.]+)\s*([smh])\s*")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def read_seconds(text: str, flag: str = "--time") -> float:
    """Parse `90s`, `20m` or `1h`, the value of `flag`.

    Raises:
        InputError: It is none of these, or no time at all.
    """
    match = _TIME.fullmatch(text)
    try:
        seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    except ValueError:
        seconds = 0.0
    if not seconds:
        raise InputError(f"{flag} '{text}' is no time", hint="expected for example 90s, 20m or 1h")
    return seconds
