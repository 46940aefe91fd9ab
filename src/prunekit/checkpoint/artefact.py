"""The header of prunekit's own file: enough to rebuild the network before its weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prunekit import models
from prunekit.errors import InputError
from prunekit.spec import InputSpec, Origin

FORMAT = 1

# Upgrades a header by one format version, by the version it starts from.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


@dataclass(frozen=True)
class Header:
    """Description of a network in its file.

    `structure` is the shape that surgery left, see `prunekit.surgery.structure`. `code` is `{"file", "sha256"}` where
    the architecture is a file of the user's own, to detect later changes.
    """

    origin: Origin
    structure: Mapping[str, Any]
    code: Mapping[str, str] | None = None

    def to_text(self) -> str:
        """Return the header as JSON, the same text for the same network."""
        origin = self.origin
        header = {
            "format": FORMAT,
            "arch": origin.arch,
            "arch_args": dict(origin.arch_args),
            "input": origin.input.to_json() if origin.input else None,
            "classes": list(origin.classes),
            "history": [dict(step) for step in origin.history],
            "structure": self.structure,
            "code": self.code,
        }
        try:
            return json.dumps(header, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"the network's origin cannot be stored as JSON: {error}") from error

    @classmethod
    def from_text(cls, text: object) -> Header:
        """Parse the text that `to_text` wrote, in this or an older format.

        Raises:
            InputError: The format is newer, or the text is not one that `to_text` writes.
        """
        try:
            header = json.loads(text) if isinstance(text, str) else None
            if not isinstance(header, dict):
                raise TypeError("no JSON object")
            return cls._from_json(_migrated(header))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"its header is damaged: {type(error).__name__}: {error}") from error

    @classmethod
    def _from_json(cls, header: Mapping[str, Any]) -> Header:
        origin = Origin(
            _expect(header["arch"], str),
            _expect(header["arch_args"], dict),
            InputSpec.from_json(header["input"]) if header["input"] is not None else None,
            tuple(_expect(name, str) for name in _expect(header["classes"], list)),
            tuple(_expect(step, dict) for step in _expect(header["history"], list)),
        )
        structure = _expect(header["structure"], dict)
        for part in ("parameters", "attributes"):
            _expect(structure[part], dict)
        code = header["code"]
        return cls(origin, structure, None if code is None else _expect(code, dict))


def code_of(arch: str) -> dict[str, str] | None:
    """Return the file that `arch` names, with the hash of its code and its neighbours'; None where it names no file."""
    path = models.source_file(arch) if models.is_code(arch) else None
    if path is None:
        return None
    return {"file": str(path), "sha256": models.source_digests(path)[0]}


def _migrated(header: dict[str, Any]) -> dict[str, Any]:
    version = _expect(header["format"], int)
    if version > FORMAT:
        raise InputError(
            f"it has format {version}, and this prunekit reads up to {FORMAT}",
            hint="a newer prunekit reads it",
        )
    while version < FORMAT:
        header = MIGRATIONS[version](header)
        version += 1
    return header


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value
