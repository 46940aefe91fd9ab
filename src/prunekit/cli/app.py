"""The root command, and the exit status of each run."""

from __future__ import annotations

import importlib
import os
import shlex
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from prunekit import __version__
from prunekit.cli.framework.build import Command, build, build_group, one_line_each
from prunekit.errors import InputError, Noted, PrunekitError, unknown_name
from prunekit.report.terminal.output import ClosedPipeError, Output, discard_stdout

if TYPE_CHECKING:
    from collections.abc import Iterator

BUG = 70
INTERRUPTED = 130

# name -> one line of help; each is a module of prunekit.cli.commands with a `COMMAND`. Methods come in between.
_BEFORE_METHODS = {"inspect": "What a network is made of: layers, channel groups, cost, and what is frozen and why."}
_AFTER_METHODS = {
    "train": "Train or fine-tune any model; with --sparsity, as Network Slimming asks.",
    "eval": "Accuracy, loss, parameters, MACs, size and measured latency; several models side by side.",
    "compare": "Models side by side as a table, CSV, Markdown, a picture or a page.",
    "fit": "Say how much accuracy may go, get the smallest network: searched, proven, and tuned in the time there is.",
    "sweep": "Methods over budgets: accuracy against cost, as a table, a picture or a page; resumable.",
    "export": "A file that needs neither prunekit nor the model's code: ONNX or .pt2, compared with the model first.",
    "convert": "From any model file to prunekit's own, .safetensors or a plain state dict.",
    "archs": "The networks that --arch takes by name, searched, with their parameters, MACs and input sizes.",
    "methods": "The installed pruning methods and ways of restoring, and the packages that they come from.",
    "completion": "The script that teaches bash, zsh or fish the commands, flags and choices.",
    "demo": "The whole story on the bundled digits: train, slim, merge, evaluate.",
}
_GROUPS = {"manidp": "ManiDP: gates that follow each input, thresholds for a budget, real acceleration."}
_BUILT_IN = {**_BEFORE_METHODS, **_GROUPS, **_AFTER_METHODS}
# What people type for what is called otherwise here.
_MEANT = {
    "prune": ("slim", "merge"),
    "compress": ("slim", "merge"),
    "finetune": ("train",),
    "fine-tune": ("train",),
    "tune": ("train",),
    "test": ("eval",),
    "validate": ("eval",),
    "benchmark": ("compare", "eval"),
    "info": ("inspect",),
    "show": ("inspect",),
    "summary": ("inspect",),
    "architectures": ("archs",),
    "networks": ("archs",),
    "models": ("archs",),
    "onnx": ("export",),
}
_HELP = """Make trained PyTorch networks smaller and really faster, with proof.

\b
Examples:
  prunekit demo
  prunekit inspect model.pt
  prunekit slim model.pt --ratio 0.5
  prunekit merge model.pt --ratio 0.5 -o small.pt
  prunekit fit model.pt --data digits --max-drop 3% -o small.pt
  prunekit eval model.pt small.pt --data digits
  prunekit manidp train model.pt --data digits --epochs 20
  prunekit export small.pt -o small.onnx
  prunekit slim model.pt --ratio 0.5 -o - | prunekit eval - --data digits --json
"""
_EPILOG = "A model is a file, - for standard input, torchvision:NAME or prunekit:NAME."


class RootGroup(TyperGroup):
    """Group that builds a command on request; listing commands needs names and summaries alone."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Return all commands: the built-in ones, and one for each installed method."""
        del ctx
        return [*_BEFORE_METHODS, *_methods(), *_GROUPS, *_AFTER_METHODS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of that name; while help lists them, only its name and summary."""
        if cmd_name not in self.list_commands(ctx):
            return None
        if cmd_name in _GROUPS and not self.listing:
            return build_group(cmd_name, _GROUPS[cmd_name], _module(cmd_name).COMMANDS)
        command = Command(_nothing) if self.listing else _load(cmd_name)
        return build(cmd_name, _summary(cmd_name), command)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command to run; where there is none, suggest the nearest."""
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known:
            if args[0] in _MEANT:
                meant = " or ".join(f"prunekit {name}" for name in _MEANT[args[0]])
                raise InputError(f"unknown command '{args[0]}'", hint=f"did you mean {meant}?")
            raise unknown_name("command", args[0], known)
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help without importing any command."""
        with self._listing():
            super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Complete the name of a command without importing any."""
        with self._listing():
            return one_line_each(super().shell_complete(ctx, incomplete))

    @contextmanager
    def _listing(self) -> Iterator[None]:
        self.listing = True
        try:
            yield
        finally:
            self.listing = False


def _methods() -> list[str]:
    from prunekit.methods import registry

    return [name for name in registry.names() if name not in _BUILT_IN]


def _summary(name: str) -> str:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    from prunekit.methods import registry

    try:
        return registry.get(name).summary
    except Exception as error:  # a plug-in may raise anything, which must not break the help of all others
        return f"(cannot be loaded: {type(error).__name__}: {error})"


def _nothing() -> None:
    """Stand in for a command whose code is not needed."""


def _load(name: str) -> Command:
    if name in _BUILT_IN:
        command: Command = _module(name).COMMAND
        return command
    from prunekit.cli.commands.method import command_for

    return command_for(name)


def _module(name: str) -> Any:
    return importlib.import_module(f"prunekit.cli.commands.{name}")


def _show_version(wanted: bool) -> None:
    if wanted:
        Output().data(f"prunekit {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    """Options of the program itself; the work is in the commands."""
    del version


def root_command() -> Any:
    """Return the whole command line as one object that parses arguments."""
    app = typer.Typer(cls=RootGroup, rich_markup_mode=None, add_completion=True)
    app.callback(help=_HELP, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})(_root)
    return typer.main.get_command(app)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit status (see `prunekit.errors`); every error is shown here."""
    output = Output()
    output.called, output.debug = shlex.join(["prunekit", *args]), "--debug" in args
    status = BUG
    try:
        with _plain_warnings(output):
            status = _finished(_parsed_and_run(args, output))
    except (ClosedPipeError, BrokenPipeError):
        discard_stdout()
        status = 0
    except KeyboardInterrupt:
        output.error("interrupted")
        status = INTERRUPTED
    except Exception as error:
        status = _report(error, output)
    finally:
        output.close_log(status)
    return status


def _parsed_and_run(args: Sequence[str], output: Output) -> object:
    """Return the parser's exit status, or the result of the command, which has no meaning."""
    arguments = list(args) or ["--help"]
    if arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    try:
        return root_command().main(args=arguments, prog_name="prunekit", standalone_mode=False, obj=output)
    except SystemExit as stop:  # completion scripts, and a closed pipe that the parser saw first
        if isinstance(stop.__context__, BrokenPipeError):
            raise ClosedPipeError from None
        return stop.code


def _finished(result: object) -> int:
    if result == INTERRUPTED:  # the parser turns Ctrl-C into this status
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _report(error: Exception, output: Output) -> int:
    """Show an error in one or two lines and return its exit status."""
    ours = not isinstance(error, PrunekitError | OSError) and not hasattr(error, "format_message")
    output.traceback(error, bug=ours)
    if isinstance(error, PrunekitError):
        output.error(error.message, error.hint)
        return error.exit_code
    if hasattr(error, "format_message"):  # usage errors of the argument parser
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "prunekit"
        output.error(error.format_message(), f"see {path} --help")
        return 2
    if isinstance(error, OSError) and error.strerror:  # the environment's fault: a full disk, no permission
        where = f"{error.filename}: " if error.filename else ""
        output.error(f"{where}{error.strerror}")
        return 2
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    output.error(f"a bug in prunekit: {what}", "run it again with --debug to see where, and please report it")
    return BUG


@contextmanager
def _plain_warnings(output: Output) -> Iterator[None]:
    """Show a warning as one line, without file and source, and hide those that only developers can act on."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, Noted):
            output.note(str(message))
        elif issubclass(category, UserWarning):
            output.warn(str(message))

    with warnings.catch_warnings():
        if "PYTHONWARNINGS" not in os.environ:
            warnings.simplefilter("default")
        warnings.showwarning = show  # type: ignore[assignment]
        yield
