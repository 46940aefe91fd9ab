"""Settings from the environment: `PRUNEKIT_KEY` for any command, `PRUNEKIT_COMMAND_KEY` for one."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

from prunekit.cli.framework.settings import Asked, Setting, setting

_PREFIX = "PRUNEKIT_"
# Variables of that prefix for other ends: the tests' real inputs, and where layer times and named code are kept.
_OTHERS = frozenset(("PRUNEKIT_ASSETS", "PRUNEKIT_CACHE", "PRUNEKIT_STATE"))
_FLAGS: dict[str, bool] = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def from_variables(variables: Mapping[str, str], asked: Asked) -> dict[str, Setting]:
    """Return the settings of a command in environment variables, by parameter name; its own win over general ones.

    A variable without text is none, for shells export such. One that no command knows is a warning alone: it may be
    another program's.

    Raises:
        InputError: A variable has a value that its flag cannot have.
    """
    general: dict[str, Setting] = {}
    own: dict[str, Setting] = {}
    for variable in sorted(name for name in variables.keys() - _OTHERS if name.startswith(_PREFIX) and variables[name]):
        key = variable.removeprefix(_PREFIX).lower().replace("_", "-")
        short = key.removeprefix("-".join((*asked.words, "")))
        if short in asked.known:
            parameter = asked.known[short]
            value = _value(variables[variable], parameter)
            (general if short == key else own)[parameter.name] = setting(variable, short, value, parameter)
        else:
            _check_known(variable, key, asked)
    return general | own


def _value(text: str, parameter: Any) -> str | bool:
    """Return the text, as true or false where that is meant."""
    return _FLAGS.get(text.strip().lower(), text) if getattr(parameter, "is_flag", False) else text


def _check_known(variable: str, key: str, asked: Asked) -> None:
    """Warn of a variable that is a setting of no command, and name the nearest that are."""
    own = {"-".join((*words, one)) for words, keys in asked.every().items() for one in keys}
    known = {*asked.elsewhere, *own}
    if key not in known:
        near = difflib.get_close_matches(key, sorted(known), n=2, cutoff=0.7)
        names = " or ".join(_PREFIX + name.replace("-", "_").upper() for name in near)
        hint = f"; did you mean {names}?" if near else ""
        warnings.warn(f"{variable} is no setting of any command{hint}", stacklevel=2)
