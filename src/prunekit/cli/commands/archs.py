"""`prunekit archs`: the networks that `--arch` takes by name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli.framework.build import Command
from prunekit.errors import unknown_name
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from prunekit.models.known import Known

Pattern = Annotated[
    str | None,
    typer.Argument(metavar="PATTERN", help="A part of the names, or a pattern such as 'resnet*'.", show_default=False),
]


def run(output: Output, pattern: Pattern = None) -> None:
    """List the networks whose names match, from the stored table: nothing is built, nor is torch imported."""
    from prunekit.models import known

    usual = [one for one in known.table() if not one.args]
    found = [one for one in usual if pattern is None or _matches(_name(one), pattern)]
    if not found:
        raise unknown_name("network", str(pattern), known.names())
    if output.json:
        output.document(document("archs", {"networks": [_facts(one) for one in found]}))
        return
    from prunekit.report import numbers
    from prunekit.report.terminal.tables import table

    rows = [(*_source(one), f"{one.params:,}", numbers.count(one.macs), "x".join(map(str, one.input))) for one in found]
    output.table(table(["network", "of", "parameters", "MACs", "input"], rows, left=2), data=True)


def _matches(name: str, pattern: str) -> bool:
    plain = pattern.lower().removeprefix("torchvision:").removeprefix("prunekit:")
    return fnmatchcase(name, plain if set("*?[") & set(plain) else f"*{plain}*")


def _name(one: Known) -> str:
    return one.arch.removeprefix("torchvision:")


def _source(one: Known) -> tuple[str, str]:
    """Return the name of a network, and the library that it is of."""
    return _name(one), "torchvision" if one.arch.startswith("torchvision:") else "prunekit"


def _facts(one: Known) -> dict[str, Any]:
    name, source = _source(one)
    figures = {"params": one.params, "macs": one.macs, "input": list(one.input)}
    return {"name": name, "arch": one.arch, "library": source, **figures}


COMMAND = Command(
    run,
    (
        "prunekit archs",
        "prunekit archs resnet",
        "prunekit archs 'efficientnet_b*' --json | jq '.networks[].arch'",
    ),
)
