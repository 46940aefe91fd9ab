"""Build a command from a plain function: examples lead its help, its options stand in sections."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from prunekit.cli.framework import config
from prunekit.cli.framework.fields import collect, options_of
from prunekit.cli.framework.settings import Asked, Setting, keys
from prunekit.errors import InputError, unknown_name
from prunekit.progress import report_progress
from prunekit.report.terminal.output import Output

_COMMON = "Common options"
_SETTINGS = "prunekit.settings"


@dataclass(frozen=True)
class CommonOptions:
    """Options that every command has."""

    json: bool = field(default=False, metadata={"help": "One JSON document on standard output."})
    quiet: bool = field(default=False, metadata={"flag": "--quiet,-q", "help": "No notes and no progress."})
    debug: bool = field(default=False, metadata={"help": "Show the traceback of an error."})
    log: str | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "Add all notes, warnings, errors and events to this file, with times."},
    )
    config: str | None = field(default=None, metadata={"metavar": "FILE", "help": "Read settings from this TOML file."})
    print_config: bool = field(
        default=False, metadata={"help": "Print all settings as such a file, with their origins, and do nothing."}
    )
    isolated: bool = field(default=False, metadata={"help": "Ignore PRUNEKIT_* variables and the project's file."})


@dataclass(frozen=True)
class Command:
    """Description of a command: the function that runs it, and examples for its help.

    `run` takes an `Output` first. A parameter that is a dataclass stands for the options of its fields (see
    `prunekit.cli.framework.fields`), under the heading in `sections` and with the flags in `flags`; any other becomes
    an argument or option by its annotation.
    """

    run: Callable[..., Any]
    examples: tuple[str, ...] = ()
    sections: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)


class SectionedCommand(TyperCommand):
    """A command with settings from elsewhere, whose help has sections: its own first, common ones last."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse `args`; missing settings come from where `prunekit.cli.framework.config` finds them."""
        found: dict[str, Setting] = {}
        if not extra.get("resilient_parsing") and not {"-h", "--help"} & set(args):
            found = config.gathered(args, _asked(self, parent))
            extra["default_map"] = {name: setting.value for name, setting in found.items()}
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[_SETTINGS] = found
        return context

    def invoke(self, ctx: Any) -> Any:
        """Run the command, or show its settings where `--print-config` asks for them."""
        if ctx.params.get("print_config"):
            Output().data(config.written(self.params, ctx.params, _origins(ctx)))
            return None
        return super().invoke(ctx)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Complete a flag or a value."""
        return one_line_each(super().shell_complete(ctx, incomplete))

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


def _asked(command: SectionedCommand, parent: Any) -> Asked:
    """Return the description of a command by which settings are looked up for it."""
    groups: list[Any] = []
    while parent is not None:
        groups.insert(0, parent)
        parent = parent.parent
    words = (*(str(group.info_name) for group in groups[1:]), str(command.name))
    siblings = tuple(group.command.list_commands(group) for group in groups) or (words,)
    return Asked(words, command.params, siblings, lambda: _every_key(groups[0]) if groups else {})


def _every_key(root: Any) -> dict[tuple[str, ...], frozenset[str]]:
    """Return the keys of all commands, by the words that are typed for them."""
    found: dict[tuple[str, ...], frozenset[str]] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root.command)]
    while waiting:
        words, command = waiting.pop()
        if not hasattr(command, "list_commands"):
            found[words] = frozenset(keys(command.params))
            continue
        for name in command.list_commands(root):
            # a plug-in that cannot be loaded has no settings to speak of
            with contextlib.suppress(Exception):
                waiting.append(((*words, name), command.get_command(root, name)))
    return found


def _origins(ctx: Any) -> dict[str, str]:
    """Return the origin of each parameter that does not have its default, by its name."""
    found = {name: setting.origin for name, setting in ctx.meta[_SETTINGS].items()}
    typed = [name for name in ctx.params if ctx.get_parameter_source(name).name == "COMMANDLINE"]
    return found | dict.fromkeys(typed, "command line")


def one_line_each(completions: Any) -> Any:
    """Shorten the explanations of completions: a shell takes a second line for another completion."""
    for completion in completions:
        if completion.help:
            completion.help = textwrap.shorten(completion.help, 70, placeholder=" …")
    return completions


def build(name: str, summary: str, command: Command) -> Any:
    """Return the parser of `command`, called `name`; `summary` is one line."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(
        name,
        cls=SectionedCommand,
        help=_help_text(summary, command.examples),
        short_help=summary,
        context_settings={"help_option_names": ["-h", "--help"]},
    )(_callback(command))
    return typer.main.get_command(app)


def build_group(name: str, summary: str, commands: Mapping[str, tuple[str, Command]]) -> Any:
    """Return the parser of a group of commands, each with one line of help."""
    group = SubGroup(name=name, help=_group_help(summary, commands), short_help=summary, rich_markup_mode=None)
    group.context_settings = {"help_option_names": ["-h", "--help"]}
    for own, (line, command) in commands.items():
        group.add_command(build(own, line, command), own)
    return group


class SubGroup(TyperGroup):
    """A group that suggests the nearest commands for an unknown one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command to run."""
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known:
            raise unknown_name(f"command of {self.name}", args[0], known)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order they were given in."""
        del ctx
        return list(self.commands)


def _group_help(summary: str, commands: Mapping[str, tuple[str, Command]]) -> str:
    return _help_text(summary, tuple(command.examples[0] for _, command in commands.values()))


def _help_text(summary: str, examples: tuple[str, ...]) -> str:
    """Return the summary and the examples; `\\b` keeps the lines of a paragraph as they are."""
    lines = "\n".join(f"  {example}" for example in examples)
    return f"{summary}\n\n\b\nExamples:\n{lines}\n" if lines else summary


def _callback(command: Command) -> Callable[..., Any]:
    """Return the function that the parser calls: it makes the `Output` and the settings objects, and calls `run`."""
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
            _extend(flat, options_of(parameter.annotation, section=section, flags=command.flags))
        else:
            _extend(flat, [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)])
    _extend(flat, options_of(CommonOptions, section=_COMMON))

    @wraps(command.run)
    def callback(_context: Any, **values: Any) -> Any:
        common = collect(CommonOptions, values)
        output = _context.obj if isinstance(_context.obj, Output) else Output()
        output.configure(quiet=common.quiet, json=common.json, debug=common.debug)
        if common.log is not None:
            output.open_log(common.log)
        settings = {name: collect(group, values) for name, group in groups.items()}
        others = {p.name: values[p.name] for p in declared if p.name not in groups}
        try:
            with report_progress(output.progress):
                return command.run(output, **settings, **others)
        finally:
            output.settle()

    context = inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    callback.__signature__ = inspect.Signature([context, *flat])  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in (context, *flat)}
    return callback


def _extend(flat: list[inspect.Parameter], more: list[inspect.Parameter]) -> None:
    """Add parameters; one with the name and type of an earlier one shares its flag.

    A method and its tuning draw from one `--seed`.

    Raises:
        InputError: Two parameters of different types want one name, or two names one flag.
    """
    known = {parameter.name: parameter for parameter in flat}
    flags = {flag: parameter.name for parameter in flat for flag in _flags(parameter)}
    for parameter in more:
        earlier = known.get(parameter.name)
        if earlier is None:
            taken = [flag for flag in _flags(parameter) if flag in flags]
            if taken:
                raise InputError(f"two settings want the flag {taken[0]}: '{flags[taken[0]]}' and '{parameter.name}'")
            flat.append(parameter)
        elif earlier.annotation != parameter.annotation:
            raise InputError(f"a setting '{parameter.name}' is there already, of another type: it needs another name")


def _flags(parameter: inspect.Parameter) -> list[str]:
    """Return all flags of an option; none for an argument."""
    declared = getattr(parameter.default, "param_decls", None) or ()
    return [flag for one in declared for flag in one.split("/") if flag.startswith("-")]
