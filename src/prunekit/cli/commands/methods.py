"""`prunekit methods`: the installed pruning methods, and the installed ways of restoring."""

from __future__ import annotations

import dataclasses
from typing import Any

from prunekit.cli.framework.build import Command
from prunekit.errors import PrunekitError
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output


def run(output: Output) -> None:
    """List methods and ways of restoring, with the reason for those that cannot be loaded."""
    from prunekit.methods import registry
    from prunekit.restoration.registry import restorations

    methods = [*map(_method, registry.names()), _manidp()]
    ways = [_restoration(name) for name in restorations()]
    if output.json:
        output.document(document("methods", {"methods": methods, "restorations": ways}))
        return
    from rich.console import Group

    from prunekit.report.terminal.tables import table

    tables = [
        table([title, "package", "what it does"], [_row(facts) for facts in found], left=3)
        for title, found in (("method", methods), ("restoration", ways))
    ]
    output.table(Group(*tables), data=True)


def _row(facts: dict[str, Any]) -> tuple[str, str, str]:
    return facts["name"], facts["package"], facts["summary"] or facts["error"]


def _method(name: str) -> dict[str, Any]:
    from prunekit.methods import registry

    facts: dict[str, Any] = {"name": name, "package": registry.source(name), "summary": None, "settings": []}
    try:
        method = registry.get(name)
    except Exception as error:  # a plug-in may raise anything when it is made
        return {**facts, "error": _said(error)}
    settings = [_setting(field) for field in dataclasses.fields(method.Config)]
    return {**facts, "summary": method.summary, "settings": settings, "error": None}


def _restoration(name: str) -> dict[str, Any]:
    from prunekit.restoration.registry import RESTORATIONS, settings_of

    facts: dict[str, Any] = {"name": name, "package": RESTORATIONS.source(name)}
    try:
        kind = RESTORATIONS.load(name)
        settings = [{"name": key, "default": default} for key, default in settings_of(kind).items()]
        found = {"summary": kind.summary, "needs_images": kind.needs_images, "settings": settings}
    except Exception as error:
        return {**facts, "summary": None, "needs_images": None, "settings": [], "error": _said(error)}
    return {**facts, **found, "error": None}


def _said(error: Exception) -> str:
    return error.message if isinstance(error, PrunekitError) else f"{type(error).__name__}: {error}"


def _manidp() -> dict[str, Any]:
    """Return the facts of the method that is a group of commands, since it trains a network instead of cutting it."""
    from prunekit.methods.manidp.config import SUMMARY, GateRecipe

    settings = [_setting(field) for field in dataclasses.fields(GateRecipe)]
    facts = {"name": "manidp", "package": "prunekit", "summary": SUMMARY}
    return {**facts, "settings": settings, "error": None}


def _setting(field: dataclasses.Field[Any]) -> dict[str, Any]:
    from prunekit.cli.framework.fields import flags_of
    from prunekit.methods.base import choices_of

    default = None if field.default is dataclasses.MISSING else field.default
    return {
        "name": field.name,
        "flag": flags_of(field)[0],
        "default": default,
        "choices": list(choices_of(field)),
        "help": field.metadata.get("help", ""),
    }


COMMAND = Command(run, ("prunekit methods", "prunekit methods --json | jq '.restorations[].name'"))
