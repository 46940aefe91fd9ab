"""Settings from files and the environment: `--config FILE` reads what `--print-config` writes.

Whoever comes first wins: the command line, `--config`, `PRUNEKIT_*` variables, the file of the project, the defaults.

The keys are the flags' names. Keys at the top of a file are for any command that has them; a table with a command's
name is for that command alone (`[slim]`, `[manidp.train]`), and wins over the former.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.cli.framework.environment import from_variables
from prunekit.cli.framework.settings import Asked, Setting, keys, setting
from prunekit.errors import InputError, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PROJECT_FILE = "prunekit.toml"
_NAMED = ("prunekit:", "torchvision:", "timm:")


def gathered(arguments: Sequence[str], asked: Asked) -> dict[str, Setting]:
    """Return the settings for a command that is called with `arguments`, by parameter name.

    Raises:
        InputError: A file is unreadable, has a key that no command has, or a value that no flag can have.
    """
    flags = _before_dashes(arguments)
    found: dict[str, Setting] = {}
    if "--isolated" not in flags:
        found |= _from_project(Path.cwd(), asked)
        found |= from_variables(os.environ, asked)
    path = _named_file(flags)
    return found | (_from_tables(_parsed(Path(path)), path, asked) if path is not None else {})


def written(parameters: Sequence[Any], values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """Return TOML that sets every parameter to its value; parameters without one are commented out.

    `origins` says, by parameter name, what stands behind a setting as a comment.
    """
    lines = []
    for key, parameter in keys(parameters).items():
        value = values.get(parameter.name)
        line = f"# {key} =" if value is None else f"{key} = {_toml(value)}"
        lines.append(f"{line}  # {origins[parameter.name]}" if parameter.name in origins else line)
    return "\n".join(lines)


def _before_dashes(arguments: Sequence[str]) -> list[str]:
    """Return the arguments before `--`, after which there are no flags."""
    return list(arguments[: arguments.index("--")] if "--" in arguments else arguments)


def _named_file(flags: Sequence[str]) -> str | None:
    """Return the file that `--config FILE` or `--config=FILE` names."""
    for place, argument in enumerate(flags):
        if argument.startswith("--config="):
            return argument.partition("=")[2]
        if argument == "--config" and place + 1 < len(flags):
            return flags[place + 1]
    return None


def _from_project(folder: Path, asked: Asked) -> dict[str, Setting]:
    """Return the settings in the file of the project around `folder`.

    It may lie in a folder that others made, so it may not make prunekit run code that nobody named.
    """
    found = _project_file(folder)
    if found is None:
        return {}
    path, content = found
    name = os.path.relpath(path, folder)
    settings = _from_tables(content, name if path.name == _PROJECT_FILE else f"{name} [tool.prunekit]", asked)
    for key, one in settings.items():
        code = key == "arch" and ":" in str(one.value) and not str(one.value).startswith(_NAMED)
        if code or (key == "trust_pickle" and one.value):
            flag = "--" + key.replace("_", "-")
            raise InputError(
                f"{one.origin}: {flag[2:]} = {_toml(one.value)} would run code, which a project's file may not ask for",
                hint=f"say {flag} yourself, set PRUNEKIT_{key.upper()}, or keep it in a file for --config",
            )
    return settings


def _project_file(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the nearest `prunekit.toml`, or `pyproject.toml` with a table `tool.prunekit`, and the settings in it.

    The search goes up to the root of the Git repository. Outside one it ends where it began: a folder such as `/tmp`
    holds other people's files.
    """
    around = [folder, *folder.parents]
    root = next((place for place in around if (place / ".git").exists()), folder)
    for place in around[: around.index(root) + 1]:
        own, shared = place / _PROJECT_FILE, place / "pyproject.toml"
        if own.is_file():
            return own, _parsed(own)
        # without its name in it, the file is of no concern here, in order or not
        if shared.is_file() and b"prunekit" in shared.read_bytes():
            content = _parsed(shared).get("tool", {}).get("prunekit")
            if content is not None:
                return shared, content
    return None


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # tomllib's own error and bad UTF-8 are ValueErrors
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot read the settings in {path}: {reason}") from error


def _from_tables(content: Mapping[str, Any], place: str, asked: Asked) -> dict[str, Setting]:
    """Return the settings at the top of a file, in the table of the command's group, and in its own, in this order."""
    found: dict[str, Setting] = {}
    for depth in range(len(asked.words) + 1):
        tables = {key: value for key, value in content.items() if isinstance(value, dict)}
        known = asked.siblings[depth] if depth < len(asked.words) else ()
        for name in tables.keys() - known:
            error = unknown_name("command", name, known)
            raise InputError(f"{place}: {error.message}", hint=error.hint)
        at = asked.own_parameter if depth == len(asked.words) else asked.parameter
        for key in content.keys() - tables:
            parameter = at(key, place)
            if parameter is not None:
                found[parameter.name] = setting(place, key, content[key], parameter)
        word = asked.words[depth] if depth < len(asked.words) else None
        if word not in tables:
            break
        content = tables[word]
        place = f"{place.removesuffix(']')}.{word}]" if place.endswith("]") else f"{place} [{word}]"
    return found


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
