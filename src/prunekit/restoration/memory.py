"""Sizes of memory as people write them, `2GiB` or `500MB`."""

from __future__ import annotations

import re

from prunekit.errors import InputError

MEMORY = "512MiB"  # what waiting passes hold in memory, at most

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


def read_memory(size: str | int) -> int:
    """Return a size in bytes.

    Raises:
        InputError: It is no size, or no more than nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    unit = _UNITS.get(found[2].upper()) if found else None
    amount = int(float(found[1]) * unit) if found and unit else 0
    if amount < 1:
        raise InputError(f"--memory '{size}' is no size", hint="for example 2GiB, 500MB, or a number of bytes")
    return amount


def size_in_words(size: int) -> str:
    """Return bytes as people write them: 1.5 GiB, 0.3 MiB."""
    unit = "GiB" if size >= 1 << 29 else "MiB"
    return f"{size / _UNITS[unit.upper()]:,.1f} {unit}"
