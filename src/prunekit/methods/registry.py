"""Registry of installed methods, here or in another package: entry points of the group `prunekit.methods`."""

from __future__ import annotations

from prunekit.methods.base import Method
from prunekit.plugins import Plugins

_METHODS = Plugins(
    "prunekit.methods",
    "method",
    Method,  # type: ignore[type-abstract]
    {"narrow-heads": "prunekit.methods.narrow_heads.method:NarrowHeads"},
)
names = _METHODS.names
source = _METHODS.source


def is_general(method: Method) -> bool:
    """Return whether a method is swept where none is named: no baseline, and made for any network."""
    return not method.baseline and not method.inside_heads


def get(name: str) -> Method:
    """Return the method of that name.

    Raises:
        InputError: There is no such method (the nearest names are suggested), or the entry point is not a method.
    """
    return _METHODS.load(name)()
