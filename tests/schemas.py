"""JSON Schema, as far as `docs/schemas` uses it; a keyword that is not known here is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunekit.methods import registry

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


def check(value: dict[str, Any]) -> None:
    """Raise `AssertionError` unless the document follows the schema of the command that it is of."""
    name = value["schema"].removeprefix("prunekit.")
    root = schema("method" if name in registry.names() else name)
    _check(value, root, root, "$")


def schema(name: str) -> dict[str, Any]:
    """`docs/schemas/NAME.json`."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _check(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str) -> None:
    for keyword, wanted in schema.items():
        _KEYWORDS[keyword](value, wanted, schema, root, where)


def _type(value: Any, wanted: Any, _schema: Any, _root: Any, where: str) -> None:
    names = wanted if isinstance(wanted, list) else [wanted]
    kinds = tuple(kind for name in names for kind in _TYPES[name])
    assert isinstance(value, kinds), f"{where}: {value!r} is no {wanted}"
    assert not isinstance(value, bool) or "boolean" in names, f"{where}: {value!r} is no {wanted}"


def _properties(value: Any, wanted: Any, _schema: Any, root: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, schema in wanted.items():
            if key in value:
                _check(value[key], schema, root, f"{where}.{key}")


def _required(value: Any, wanted: Any, _schema: Any, _root: Any, where: str) -> None:
    missing = set(wanted) - set(value) if isinstance(value, dict) else set()
    assert not missing, f"{where}: {missing} missing"


def _additional(value: Any, wanted: Any, schema: Any, root: Any, where: str) -> None:
    if isinstance(value, dict):
        others = set(value) - set(schema.get("properties", ()))
        if isinstance(wanted, dict):
            for key in others:
                _check(value[key], wanted, root, f"{where}.{key}")
        else:
            assert wanted or not others, f"{where}: {others} not in the schema"


def _items(value: Any, wanted: Any, _schema: Any, root: Any, where: str) -> None:
    for place, item in enumerate(value if isinstance(value, list) else ()):
        _check(item, wanted, root, f"{where}[{place}]")


def _any_of(value: Any, wanted: Any, _schema: Any, root: Any, where: str) -> None:
    problems = []
    for schema in wanted:
        try:
            return _check(value, schema, root, where)
        except AssertionError as error:
            problems.append(str(error))
    raise AssertionError(" and ".join(problems))


def _number(holds: Callable[[Any, Any], bool]) -> Callable[..., None]:
    def check_one(value: Any, wanted: Any, _schema: Any, _root: Any, where: str) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        assert not number or holds(value, wanted), f"{where}: {value!r} against {wanted!r}"

    return check_one


def _says(holds: Callable[[Any, Any], bool]) -> Callable[..., None]:
    def check_one(value: Any, wanted: Any, _schema: Any, _root: Any, where: str) -> None:
        assert holds(value, wanted), f"{where}: {value!r} against {wanted!r}"

    return check_one


def _ref(value: Any, wanted: str, _schema: Any, root: Any, where: str) -> None:
    _check(value, root["$defs"][wanted.removeprefix("#/$defs/")], root, where)


_KEYWORDS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("$schema", "title", "$defs", "description"), lambda *_: None),
    "type": _type,
    "properties": _properties,
    "required": _required,
    "additionalProperties": _additional,
    "items": _items,
    "anyOf": _any_of,
    "$ref": _ref,
    "const": _says(lambda value, wanted: value == wanted),
    "enum": _says(lambda value, wanted: value in wanted),
    "pattern": _says(lambda value, wanted: value is None or re.search(wanted, value) is not None),
    "minItems": _says(lambda value, wanted: len(value) >= wanted),
    "minimum": _number(lambda value, wanted: value >= wanted),
    "maximum": _number(lambda value, wanted: value <= wanted),
}
