"""The vocabulary of settings that were not typed: their keys, their values, and the command that they are for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunekit.errors import InputError, unknown_name

# Parameters that control the settings, and are none themselves.
_NOT_SETTINGS = frozenset(("config", "print_config", "isolated", "help"))


@dataclass(frozen=True)
class Setting:
    """A value as the parser takes it, and the place that it comes from."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Asked:
    """The command that is to run.

    Attributes:
        words: What is typed for it, such as `("manidp", "train")`.
        parameters: Its parameters.
        siblings: The names of all commands at each level, outermost first.
        every: Returns the keys of each command, by its words; takes a while.
    """

    words: tuple[str, ...]
    parameters: Sequence[Any]
    siblings: tuple[Sequence[str], ...]
    every: Callable[[], Mapping[tuple[str, ...], frozenset[str]]]

    @cached_property
    def known(self) -> dict[str, Any]:
        """The parameters that are settings, by their keys."""
        return keys(self.parameters)

    @cached_property
    def elsewhere(self) -> frozenset[str]:
        """The keys that any command knows."""
        return frozenset(self.known).union(*self.every().values())

    def parameter(self, key: str, place: str) -> Any | None:
        """Return the parameter of a key that is for any command; None where only other commands have it.

        Raises:
            InputError: No command has it.
        """
        name = key.replace("_", "-")
        if name not in self.known and name not in self.elsewhere:
            error = unknown_name("setting", key, self.elsewhere)
            raise InputError(f"{place}: {error.message}, which no command has", hint=error.hint)
        return self.known.get(name)

    def own_parameter(self, key: str, place: str) -> Any:
        """Return the parameter of a key that is for this command; raise `InputError` where it has none."""
        if key.replace("_", "-") not in self.known:
            error = unknown_name("setting", key, self.known)
            raise InputError(f"{place}: {error.message} of '{' '.join(self.words)}'", hint=error.hint)
        return self.known[key.replace("_", "-")]


def keys(parameters: Sequence[Any]) -> dict[str, Any]:
    """Return the click parameters that are settings, by their keys: long flags without dashes, arguments' names."""
    settings = [parameter for parameter in parameters if parameter.name not in _NOT_SETTINGS]
    return {max(parameter.opts, key=len).lstrip("-").replace("_", "-"): parameter for parameter in settings}


def setting(place: str, key: str, value: Any, parameter: Any) -> Setting:
    """Return a value as the parser takes it: text and numbers as they are, several values with commas.

    Raises:
        InputError: No flag can have that value.
    """
    flag = getattr(parameter, "is_flag", False)
    if isinstance(value, bool) is not flag:
        wanted = "true or false" if flag else "text or a number"
        raise InputError(f"{place}: {key} = {json.dumps(value, default=str)}: expected {wanted}")
    several = getattr(parameter, "multiple", False) or getattr(parameter, "nargs", 1) != 1
    if isinstance(value, list) and all(_is_plain(item) for item in value):
        return Setting([str(item) for item in value] if several else ",".join(map(str, value)), place)
    if not _is_plain(value):
        raise InputError(f"{place}: {key} has a value of type {type(value).__name__}, expected text or a number")
    return Setting([str(value)] if several else value, place)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not (isinstance(value, str) and "\0" in value)
