"""Settings from a TOML file: `--config FILE` reads what `--print-config` writes. The keys are the flags' names.

Keys at the top are for any command that reads the file; a table with a command's name is for that command alone, and
takes precedence. The command line takes precedence over both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.errors import InputError, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Parameters that control the settings, and are none themselves.
_NOT_SETTINGS = frozenset(("config", "print_config", "help"))


def key_of(parameter: Any) -> str:
    """Return the key of a click parameter in a file: its long flag without dashes, or an argument's name."""
    longest = max(parameter.opts, key=len)
    return str(longest).lstrip("-").replace("_", "-")


def named_file(arguments: Sequence[str]) -> str | None:
    """Return the file that `--config FILE` or `--config=FILE` names among the arguments of a command."""
    for place, argument in enumerate(arguments):
        if argument == "--":
            return None
        if argument.startswith("--config="):
            return argument.partition("=")[2]
        if argument == "--config" and place + 1 < len(arguments):
            return arguments[place + 1]
    return None


def read(path: str, command: str, parameters: Sequence[Any], commands: Sequence[str]) -> dict[str, Any]:
    """Return the settings in the file for `command`, by parameter name.

    Raises:
        InputError: The file is unreadable, has a key that the command lacks, or a value that no flag can have.
    """
    content = _parsed(path)
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    for name in tables:
        if name not in commands:
            error = unknown_name("command", name, commands)
            raise InputError(f"{path}: {error.message}", hint=error.hint)
    general = {key: value for key, value in content.items() if key not in tables}
    known = {key_of(p): p for p in parameters if p.name not in _NOT_SETTINGS}
    found: dict[str, Any] = {}
    for key, value in {**general, **tables.get(command, {})}.items():
        parameter = known.get(key.replace("_", "-"))
        if parameter is None:
            error = unknown_name("setting", key, known)
            raise InputError(f"{path}: {error.message} of '{command}'", hint=error.hint)
        found[parameter.name] = _value(path, key, value, parameter)
    return found


def written(parameters: Sequence[Any], values: Mapping[str, Any]) -> str:
    """Return TOML that sets every parameter to its value; parameters without one are commented out."""
    lines = []
    for parameter in parameters:
        if parameter.name in _NOT_SETTINGS:
            continue
        value = values.get(parameter.name)
        key = key_of(parameter)
        lines.append(f"# {key} =" if value is None else f"{key} = {_toml(value)}")
    return "\n".join(lines)


def _parsed(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # tomllib's own error and bad UTF-8 are ValueErrors
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot read the settings in {path}: {reason}") from error


def _value(path: str, key: str, value: Any, parameter: Any) -> Any:
    """Return the value as the parser takes it: text and numbers as they are, several values with commas."""
    flag = getattr(parameter, "is_flag", False)
    if isinstance(value, bool) is not flag:
        wanted = "true or false" if flag else "text or a number"
        raise InputError(f"{path}: {key} = {json.dumps(value, default=str)}: expected {wanted}")
    several = getattr(parameter, "multiple", False) or getattr(parameter, "nargs", 1) != 1
    if isinstance(value, list) and all(_is_plain(item) for item in value):
        return [str(item) for item in value] if several else ",".join(map(str, value))
    if not _is_plain(value):
        raise InputError(f"{path}: {key} has a value of type {type(value).__name__}, expected text or a number")
    return [str(value)] if several else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not (isinstance(value, str) and "\0" in value)


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
