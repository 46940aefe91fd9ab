"""The names of a classifier's outputs, from a file: one a line, or a JSON list."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunekit.errors import InputError

_EXPECTED = "expected one class name a line, or a JSON list of them, in the order of the classifier's outputs"


def read_class_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the names in a file, in its order; blank lines at its end do not count.

    Raises:
        InputError: It cannot be read as text, holds no names, a blank line between names, or JSON that is no list.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"the class names in {path} cannot be read: {error.strerror}", hint=_EXPECTED) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file", hint=_EXPECTED) from error
    return checked_class_names(_json(text, path) if text.lstrip()[:1] in ("[", "{") else _lines(text), str(path))


def checked_class_names(names: Iterable[Any] | str, where: str = "classes") -> tuple[str, ...]:
    """Return the names as a tuple; raise `InputError` unless they are texts, none of them empty."""
    if isinstance(names, str):
        raise InputError(f"{where} is the text '{names}', expected a list of class names")
    found = tuple(names)
    wrong = next((i for i, name in enumerate(found) if not isinstance(name, str) or not name.strip()), None)
    if wrong is not None:
        raise InputError(f"class {wrong} of {where}, counted from 0, is {found[wrong]!r}, not a name", hint=_EXPECTED)
    if not found:
        raise InputError(f"{where} holds no class names", hint=_EXPECTED)
    return found


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip().splitlines()]


def _json(text: str, path: str | os.PathLike[str]) -> list[Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} begins like JSON and is none: {error}", hint=_EXPECTED) from error
    if not isinstance(content, list):
        raise InputError(f"{path} is JSON, but not a list", hint=_EXPECTED)
    return content
