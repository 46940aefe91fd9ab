"""Arguments of architectures, read from text and checked before anything is built with them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from prunekit.errors import InputError, unknown_name

_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}


def parse_args(text: str) -> dict[str, Any]:
    """Read `key=value[,key=value]`; a value that looks like an int, float, bool or None becomes one.

    Raises:
        InputError: An item is not `key=value`, or a key is given twice.
    """
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key.isidentifier():
            raise InputError(
                f"'{item}' is not an argument of an architecture",
                hint="expected key=value[,key=value], for example shortcut=conv,relu=input",
            )
        if key in found:
            raise InputError(f"argument '{key}' is given twice")
        found[key] = _typed(value)
    return found


def check_args(name: str, make: Callable[..., nn.Module], args: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise `InputError` unless `args` suit what `make` declares and `fixed` leaves open.

    Numbers must be positive. The declared types are read from the annotations of `make`.
    """
    hints = typing.get_type_hints(make.__init__ if inspect.isclass(make) else make)
    known = [key for key in inspect.signature(make).parameters if key not in fixed]
    for key, value in args.items():
        if key not in known:
            raise unknown_name(f"argument of {name}", key, known)
        problem = _problem(value, hints[key])
        if problem:
            raise InputError(f"argument {key} of {name} must be {problem}, not {value!r}")


def _problem(value: object, hint: Any) -> str | None:
    """Return what the value should have been, or None where it suits the type hint."""
    choices = typing.get_args(hint)
    if choices:
        return None if value in choices else " or ".join(map(str, choices))
    if hint is str:
        return None if isinstance(value, str) else "text"
    kinds, words = (int, "a positive whole number") if hint is int else ((int, float), "a positive number")
    # bool is an int to Python, and not a NaN-proof comparison: `not value > 0` refuses NaN as well
    if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0 or value == float("inf"):
        return words
    return None


def _typed(text: str) -> int | float | bool | str | None:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
