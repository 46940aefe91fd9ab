"""JSON documents. Their keys are a promise: removing one raises the document's `version`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

VERSION = 1

# Controls beyond those that JSON escapes anyway, text direction marks, line separators.
_OBEYED = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def document(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document: `schema` and `version` first, then its fields."""
    return {"schema": f"prunekit.{name}", "version": VERSION, **fields}


def eval_document(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one entry per model; the fields of a single model stand at the top as well, for `jq .accuracy`."""
    single = dict(results[0]) if len(results) == 1 else {}
    return document("eval", {"results": list(results), **single})


def dumps(value: Any) -> str:
    """Return JSON text; a number that JSON lacks (NaN, infinity) becomes null, an unknown object its string.

    Characters that a terminal would obey (controls, text direction) are written as JSON escapes.
    """
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    return _OBEYED.sub(lambda found: json.dumps(found[0])[1:-1], text)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value
