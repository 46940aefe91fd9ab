"""`prunekit methods`: the installed pruning methods."""

from __future__ import annotations

import dataclasses
from typing import Any

from prunekit.cli.framework.build import Command
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output


def run(output: Output) -> None:
    """List the methods, with the reason for those that cannot be loaded."""
    from prunekit.methods import registry

    found = [_method(name) for name in registry.names()]
    if output.json:
        output.document(document("methods", {"methods": found}))
        return
    from prunekit.report.terminal.tables import table

    rows = [(method["name"], method["package"], method["summary"] or method["error"]) for method in found]
    output.table(table(["method", "package", "what it does"], rows, left=3), data=True)


def _method(name: str) -> dict[str, Any]:
    from prunekit.methods import registry

    facts: dict[str, Any] = {"name": name, "package": registry.source(name), "summary": None, "settings": []}
    try:
        method = registry.get(name)
    except Exception as error:  # a plug-in may raise anything when it is imported
        return {**facts, "error": f"{type(error).__name__}: {error}"}
    settings = [_setting(field) for field in dataclasses.fields(method.Config)]
    return {**facts, "summary": method.summary, "settings": settings, "error": None}


def _setting(field: dataclasses.Field[Any]) -> dict[str, Any]:
    from prunekit.cli.framework.fields import flags_of

    default = None if field.default is dataclasses.MISSING else field.default
    return {
        "name": field.name,
        "flag": flags_of(field)[0],
        "default": default,
        "choices": list(field.metadata.get("choices") or ()),
        "help": field.metadata.get("help", ""),
    }


COMMAND = Command(run, ("prunekit methods", "prunekit methods --json | jq '.methods[].name'"))
