"""Installed classes of one kind, prunekit's and those of other packages: found by entry points, loaded when used."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from prunekit.errors import InputError, unknown_name

T = TypeVar("T")


@dataclass(frozen=True)
class Plugins(Generic[T]):
    """The classes that derive from `contract`, by the names of the entry points of `group`.

    `word` is what one of them is called. `built_in` are those that are there without an entry point, as
    `module:Class`; no other package can take their names.
    """

    group: str
    word: str
    contract: type[T]
    built_in: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        found = {name: EntryPoint(name, value, self.group) for name, value in self.built_in.items()}
        for entry in entry_points(group=self.group):
            if entry.name in found and found[entry.name].value != entry.value:
                raise InputError(
                    f"two installed packages offer a {self.word} '{entry.name}': {found[entry.name].value} and "
                    f"{entry.value}",
                    hint="uninstall one of them",
                )
            found[entry.name] = entry
        return found

    def names(self) -> list[str]:
        """Return all names, sorted. Nothing is imported."""
        return sorted(self._entries)

    def source(self, name: str) -> str:
        """Return the installed package that offers a class, with its version, such as `prunekit 0.1.0`."""
        from prunekit import __version__

        package = self._entries[name].dist
        if package is not None:
            return f"{package.name} {package.version}"
        return f"prunekit {__version__}" if name in self.built_in else "unknown"

    def load(self, name: str) -> type[T]:
        """Return the class of that name.

        Raises:
            InputError: There is none (the nearest names are suggested), it cannot be imported, or it is none of its
                kind.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise unknown_name(self.word, name, self.names())
        try:
            found = entry.load()
        except Exception as error:  # a plug-in may raise anything when it is imported
            where = f"the {self.word} '{name}' of {self.source(name)}"
            raise InputError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, self.contract)) or inspect.isabstract(found):
            kind = f"{self.contract.__module__.partition('.')[0]} {self.contract.__name__}"
            lacking = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
            raise InputError(
                f"the entry point '{name}' ({entry.value}) is not a {kind}",
                hint=f"it lacks {lacking}" if lacking else None,
            )
        return found
