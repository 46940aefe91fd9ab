"""The two streams of a command: data goes to standard output, messages for people to standard error."""

from __future__ import annotations

import io
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from prunekit import __version__
from prunekit.errors import InputError
from prunekit.report.documents import dumps
from prunekit.report.terminal.log import Log
from prunekit.report.terminal.progress import Bar, Lines
from prunekit.report.text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_WIDTH_OFF_TERMINAL = 120
_WIDEST = 1000


class ClosedPipeError(Exception):
    """Error where nobody reads standard output any more: the command ends quietly."""


class Output:
    """The output of one run of a command.

    `quiet` drops notes and progress, never data, warnings or errors; `json` says that the data is wanted as one JSON
    document; `debug`, that tracebacks are; `called` is the command line. Of the processes that `torchrun` starts, only
    the first one writes; each may report its error.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False) -> None:
        self.rank = os.environ.get("RANK", "0")
        self.first = self.rank == "0"
        self.quiet = quiet or not self.first
        self.json = json
        self.debug = False
        self.called = "prunekit"
        self._log: Log | None = None
        self._warned: set[str] = set()
        self._bar = Bar(lambda: _console(sys.stderr))
        self._lines = Lines(self.note)
        self._lines_of_log = Lines(self.record)

    def configure(self, *, quiet: bool, json: bool, debug: bool) -> None:
        """Set what the options of a command ask for."""
        self.quiet, self.json, self.debug = quiet or not self.first, json, self.debug or debug

    def open_log(self, path: str) -> None:
        """Add everything that is said from now on, notes that `quiet` drops among it, to the text file at `path`.

        Raises:
            InputError: It cannot be written.
        """
        self._log = Log(path, f"prunekit {__version__}, in {Path.cwd()}: {self.called}")

    def close_log(self, status: int) -> None:
        """End the log, where there is one, with the exit status."""
        if self._log is not None:
            self._add_to_log(f"exit status {status}")
            self._log = None

    def record(self, text: str) -> None:
        """Add lines to the log, where there is one, and show nothing."""
        if self.first:
            self._add_to_log(text)

    @property
    def live(self) -> bool:
        """True where standard error is a terminal that can redraw a line."""
        return not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def progress(self, what: str, done: int, total: int, *, key: str | None = None) -> None:
        """Show how far a piece of work is, until something else is written; see `Bar`."""
        if self.live:
            self._bar(what, done, total, key=key)
        if self.live or self.quiet:
            self._lines_of_log(what, done, total)
        else:
            self._lines(what, done, total)

    def settle(self) -> None:
        """Take what shows progress away, for other output or because the work is done."""
        self._bar.hide()

    def people(self) -> Console:
        """Return a Rich console on standard error; colour follows NO_COLOR and TERM."""
        self.settle()
        return _console(sys.stderr)

    def note(self, text: str) -> None:
        """Write one line of information."""
        self.record(text)
        if not self.quiet:
            self.people().print(_shown(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Write one line of warning, once."""
        if self.first and text not in self._warned:
            self._warned.add(text)
            self.record(f"warning: {text}")
            self.people().print(f"[yellow]warning:[/] {_escaped(text)}", soft_wrap=True, markup=True)

    def error(self, message: str, hint: str | None = None) -> None:
        """Write an error and its remedy: two lines at most."""
        console = self.people()
        who = "" if self.first else f"process {self.rank}: "
        self._add_to_log(f"error: {who}{_one_line(message)}" + (f"\nhint: {_one_line(hint)}" if hint else ""))
        console.print(f"[bold red]error:[/] {who}{_escaped(_one_line(message))}", soft_wrap=True, markup=True)
        if hint:
            console.print(f"[dim]hint:[/] {_escaped(_one_line(hint))}", soft_wrap=True, markup=True)

    def table(self, content: RenderableType, *, data: bool) -> None:
        """Show a table: on standard output where it is the `data` asked for, else on standard error."""
        if not data:
            self.record(_rendered(content, io.StringIO()))
            if self.quiet:
                return
        self.settle()
        text = _rendered(content, sys.stdout if data else sys.stderr)
        if data:
            self.data(text)
        else:
            print(text, file=sys.stderr)

    def traceback(self, error: Exception, *, bug: bool) -> None:
        """Write where an error came from: on standard error for `debug`, and of a `bug` into the log in any case."""
        text = "".join(traceback.format_exception(error))
        if self.debug:
            print(text, end="", file=sys.stderr)
        if self.debug or bug:
            self._add_to_log(text)

    def _add_to_log(self, text: str) -> None:
        if self._log is None:
            return
        try:
            self._log.write(text)
        except InputError as error:  # hours of work do not end for a full disk
            self._log = None
            self.warn(f"{error.message}; nothing more is added to it")

    def data(self, text: str) -> None:
        """Write `text` to standard output with one final newline; bytes of a path that are not UTF-8 are kept."""
        self.settle()
        if self.first:
            _write(sys.stdout.buffer, (text.rstrip("\n") + "\n").encode(errors="surrogateescape"))

    def document(self, document: dict[str, Any]) -> None:
        """Write one JSON document to standard output."""
        self.data(dumps(document))

    def binary(self, content: bytes) -> None:
        """Write an artefact to standard output."""
        if self.first:
            _write(sys.stdout.buffer, content)


def _console(stream: TextIO, *, into: TextIO | None = None) -> Console:
    """Return a console with the properties of `stream` (colour, width), which writes there or into another one."""
    from rich.console import Console

    return Console(
        file=into or stream,
        force_terminal=True if into and stream.isatty() else None,
        width=None if _width_is_known(stream) else _WIDTH_OFF_TERMINAL,
        highlight=False,
        emoji=False,
        markup=False,  # names may contain such
    )


def _width_is_known(stream: TextIO) -> bool:
    return stream.isatty() or "COLUMNS" in os.environ


def _rendered(content: RenderableType, stream: TextIO) -> str:
    """Return the text of a table as it should look on `stream`; off a terminal it is as wide as its lines are."""
    from rich.measure import Measurement

    text = io.StringIO()
    console = _console(stream, into=text)
    if not _width_is_known(stream):
        least = Measurement.get(console, console.options.update(width=_WIDEST), content).minimum
        console.width = max(console.width, least)
    console.print(content)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _write(stream: BinaryIO, content: bytes) -> None:
    try:
        sys.stdout.flush()
        stream.write(content)
        stream.flush()
    except BrokenPipeError:
        discard_stdout()
        raise ClosedPipeError from None
    except OSError as error:
        discard_stdout()
        raise InputError(f"cannot write to standard output: {error.strerror}") from error


def discard_stdout() -> None:
    """Redirect standard output to nothing, so that the interpreter's last flush does not complain."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a replaced stream without a descriptor has nothing left to flush
        return


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shown(text: str) -> str:
    """Return lines for a terminal, without control characters other than line breaks."""
    return printable(text, keep="\n")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(_shown(text))
