"""The JSON documents against the schemas of `docs/schemas`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from prunekit.methods import registry

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"


def check(value: dict[str, Any]) -> None:
    """Raise `AssertionError` unless the document follows the schema of the command that it is of."""
    name = value["schema"].removeprefix("prunekit.")
    error = best_match(validator("method" if name in registry.names() else name).iter_errors(value))
    assert error is None, f"{error.json_path}: {error.message}"


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """The one of `docs/schemas/NAME.json`, which must be a schema itself."""
    found = schema(name)
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


def schema(name: str) -> dict[str, Any]:
    """`docs/schemas/NAME.json`."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found
