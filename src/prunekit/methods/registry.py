"""Registry of installed methods, here or in another package: entry points of the group `prunekit.methods`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from prunekit.errors import InputError, unknown_name
from prunekit.methods.base import Method

GROUP = "prunekit.methods"


@cache
def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in found and found[entry.name].value != entry.value:
            raise InputError(
                f"two installed packages offer a method '{entry.name}': {found[entry.name].value} and {entry.value}",
                hint="uninstall one of them",
            )
        found[entry.name] = entry
    return found


def names() -> list[str]:
    """Return the names of all installed methods, sorted. Nothing is imported."""
    return sorted(_entries())


def source(name: str) -> str:
    """Return the installed package that offers a method, with its version, such as `prunekit 0.1.0`."""
    package = _entries()[name].dist
    return f"{package.name} {package.version}" if package is not None else "unknown"


def get(name: str) -> Method:
    """Return the method of that name.

    Raises:
        InputError: There is no such method (the nearest names are suggested), or the entry point is not a method.
    """
    entry = _entries().get(name)
    if entry is None:
        raise unknown_name("method", name, names())
    kind = entry.load()
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise InputError(f"the entry point '{name}' ({entry.value}) is not a prunekit Method")
    return kind()
