"""`prunekit archs`: the networks that `--arch` takes by name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli import named_code
from prunekit.cli.framework.build import Command
from prunekit.errors import counted, unknown_name
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from prunekit.models.known import Known

Pattern = Annotated[
    str | None,
    typer.Argument(metavar="PATTERN", help="A part of the names, or a pattern such as 'resnet*'.", show_default=False),
]


Remembered = Annotated[
    bool, typer.Option("--remembered", help="List the code that was named for files, with --arch file.py:callable.")
]
Forget = Annotated[
    str | None,
    typer.Option("--forget", metavar="FILE", help="Forget the code that was named for a file, or for all of them."),
]


def run(output: Output, pattern: Pattern = None, remembered: Remembered = False, forget: Forget = None) -> None:
    """List the networks whose names match, from the stored table: nothing is built, nor is torch imported."""
    from prunekit.models import known

    if remembered or forget is not None:
        _show_named(
            output, named_code.everything() if forget is None else named_code.forget(forget), forget is not None
        )
        return

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


def _show_named(output: Output, entries: list[named_code.Named], gone: bool) -> None:
    """Show the code that is remembered, or was until now."""
    if output.json:
        facts = [{"file": entry.checkpoint, "arch": entry.arch, "arch_args": entry.arch_args} for entry in entries]
        output.document(document("archs", {"forgotten" if gone else "remembered": facts}))
        return
    from prunekit.report.terminal.tables import table

    output.note(f"{'forgot' if gone else 'remembered'}: {counted(len(entries), 'file')} with code of your own")
    if entries and not gone:
        output.table(
            table(["file", "--arch"], [(entry.checkpoint, entry.arch) for entry in entries], left=2), data=True
        )


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
        "prunekit archs --remembered",
        "prunekit archs --forget model.pt",
    ),
)
