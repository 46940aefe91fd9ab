"""The JSON documents. Their keys are a promise: taking one away raises the document's `version`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

VERSION = 1


def document(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One document: `schema` and `version` first, then its fields."""
    return {"schema": f"prunekit.{name}", "version": VERSION, **fields}


def eval_document(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One entry a model; a single model's fields stand at the top as well, for `jq .accuracy`."""
    single = dict(results[0]) if len(results) == 1 else {}
    return document("eval", {"results": list(results), **single})


def dumps(value: Any) -> str:
    """JSON text; a number that JSON cannot say (NaN, infinity) becomes null, an unknown object its string."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value
