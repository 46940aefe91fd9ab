"""From a plain function to a command: examples lead its help, its options stand in sections."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import typer
from typer.core import TyperCommand

from prunekit.cli.fields import collect, options_of
from prunekit.report.output import Output

_COMMON = "Common options"


@dataclass(frozen=True)
class CommonOptions:
    """What every command takes."""

    json: bool = field(default=False, metadata={"help": "One JSON document on standard output."})
    quiet: bool = field(default=False, metadata={"flag": "--quiet,-q", "help": "No notes and no progress."})
    debug: bool = field(default=False, metadata={"help": "Show the traceback of an error."})


@dataclass(frozen=True)
class Command:
    """What makes a command: the function that runs it, and examples for its help.

    `run` takes an `Output` first. A parameter that is a dataclass stands for the options that its fields make
    (see `prunekit.cli.fields`), under the heading in `sections` and with the flags in `flags`; any other
    becomes an argument or option by its annotation.
    """

    run: Callable[..., Any]
    examples: tuple[str, ...] = ()
    sections: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)


class SectionedCommand(TyperCommand):
    """Help whose options stand in sections: the command's own first, the common ones last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each section of options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = _COMMON if parameter.name == "help" else getattr(parameter, "rich_help_panel", None)
                is_argument = parameter.param_type_name == "argument"
                sections.setdefault(title or ("Arguments" if is_argument else "Options"), []).append(record)
        common = sections.pop(_COMMON, [])
        for title, records in [*sections.items(), (_COMMON, common)]:
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def build(name: str, summary: str, command: Command) -> Any:
    """The parsing object for `command`, called `name`; `summary` is one line."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(
        name,
        cls=SectionedCommand,
        help=_help_text(summary, command.examples),
        short_help=summary,
        context_settings={"help_option_names": ["-h", "--help"]},
    )(_callback(command))
    return typer.main.get_command(app)


def _help_text(summary: str, examples: tuple[str, ...]) -> str:
    """The summary and the examples; `\\b` keeps the lines of a paragraph as they are."""
    lines = "\n".join(f"  {example}" for example in examples)
    return f"{summary}\n\n\b\nExamples:\n{lines}\n" if lines else summary


def _callback(command: Command) -> Callable[..., Any]:
    """What the parser calls: makes the `Output` and the settings objects of flat options, and calls `run`."""
    declared = list(inspect.signature(command.run, eval_str=True).parameters.values())[1:]
    groups: dict[str, type] = {
        p.name: p.annotation
        for p in declared
        if isinstance(p.annotation, type) and dataclasses.is_dataclass(p.annotation)
    }
    flat: list[inspect.Parameter] = []
    for parameter in declared:
        if parameter.name in groups:
            section = command.sections.get(parameter.name)
            flat += options_of(parameter.annotation, section=section, flags=command.flags)
        else:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    flat += options_of(CommonOptions, section=_COMMON)
    flat = list({parameter.name: parameter for parameter in flat}.values())  # one --seed serves every group that has it

    @wraps(command.run)
    def callback(**values: Any) -> Any:
        common = collect(CommonOptions, values)
        settings = {name: collect(group, values) for name, group in groups.items()}
        others = {p.name: values[p.name] for p in declared if p.name not in groups}
        return command.run(Output(quiet=common.quiet, json=common.json), **settings, **others)

    callback.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return callback
