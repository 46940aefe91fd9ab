"""The two streams, the JSON documents, and figures as people read them."""

from __future__ import annotations

import io
import json
import math
import sys
import types

import pytest

from prunekit.cli.app import run
from prunekit.errors import CheckFailed, InputError, Interrupted, SurgeryError
from prunekit.plan import Plan
from prunekit.progress import counter
from prunekit.report import numbers
from prunekit.report.documents import document, dumps, eval_document
from prunekit.report.terminal import pruning
from prunekit.report.terminal.output import ClosedPipeError, Output


def test_data_goes_out_and_notes_go_beside(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.note("working [on] it")
    output.warn("careful [really]")
    output.data("model.pt")
    captured = capsys.readouterr()
    assert captured.out == "model.pt\n"
    assert captured.err == "working [on] it\nwarning: careful [really]\n"


def test_quiet_drops_notes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(quiet=True)
    output.note("working")
    output.warn("careful")
    output.error("broken", "mend it")
    output.data("model.pt")
    captured = capsys.readouterr()
    assert captured.out == "model.pt\n"
    assert captured.err == "warning: careful\nerror: broken\nhint: mend it\n"


def test_an_error_is_one_line_and_its_hint_another(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error("a\nlong\n  story " + "x" * 300, "do\nthis")
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_only_the_first_process_writes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    output = Output()
    output.note("working")
    output.data("model.pt")
    output.error("broken")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: process 1: broken\n"


def test_no_colour_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error("broken")
    assert "\x1b" not in capsys.readouterr().err


class _Closed(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise BrokenPipeError(data)


class _Full(_Closed):
    def write(self, data: object) -> int:
        raise OSError(28, "No space left on device", data)


def _stdout(raw: io.RawIOBase) -> io.TextIOWrapper:
    return io.TextIOWrapper(raw, write_through=True)  # type: ignore[type-var,arg-type,unused-ignore]


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _stdout(_Closed()))
    with pytest.raises(ClosedPipeError):
        Output().data("text")
    assert run(["--version"]) == 0
    assert run(["--help"]) == 0


def test_a_full_disk_behind_standard_output_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _stdout(_Full()))
    with pytest.raises(InputError, match="No space left"):
        Output().data("text")


def test_documents_name_their_schema_and_version() -> None:
    assert document("slim", {"output": "a.pt"}) == {"schema": "prunekit.slim", "version": 1, "output": "a.pt"}


def test_one_result_stands_at_the_top_as_well() -> None:
    one = {"model": "a.pt", "accuracy": 0.5}
    assert eval_document([one]) == {
        "schema": "prunekit.eval",
        "version": 1,
        "results": [one],
        "model": "a.pt",
        "accuracy": 0.5,
    }
    assert set(eval_document([one, one])) == {"schema", "version", "results"}


def test_json_has_no_words_for_infinity() -> None:
    text = dumps({"loss": math.nan, "all": [math.inf, 1.0], "deep": {"x": -math.inf}})
    assert json.loads(text) == {"loss": None, "all": [None, 1.0], "deep": {"x": None}}


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (numbers.count(853018), "853 K"),
        (numbers.count(999), "999"),
        (numbers.count(4089184256), "4.09 G"),
        (numbers.count(None), "–"),
        (numbers.data_size(3450000), "3.45 MB"),
        (numbers.data_size(12), "12 B"),
        (numbers.percent(0.9388), "93.88 %"),
        (numbers.percent(None), "–"),
        (numbers.change(200, 100), "−50 %"),
        (numbers.change(100, 110), "+10 %"),
        (numbers.milliseconds(2.345678), "2.35 ms"),
        (numbers.milliseconds(234.5678), "235 ms"),
        (numbers.duration(5.25), "5.2 s"),
        (numbers.duration(75.2), "1 m 15 s"),
        (numbers.duration(3725), "1 h 02 m"),
    ],
)
def test_figures(shown: str, text: str) -> None:
    assert shown == text


class Clock:
    """A clock that stands until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def test_progress_off_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    output = Output()
    for now, what, done in ((0, "a", 100), (1, "a", 200), (11, "a", 600), (12, "b", 1), (19, "b", 2), (24, "b", 5)):
        clock.now = now
        output.progress(what, done, 10 if what == "b" else 1000)
    assert capsys.readouterr().err == "a: 600 of 1,000, 8.8 s left\nb: 5 of 10, 15.0 s left\n"
    clock.now = 50
    output.progress("c", 70, 0)
    clock.now = 61
    output.progress("c", 80, 0)
    assert capsys.readouterr().err == "c: 80\n", "of what has just begun nothing is known"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("bad", hint="do better"), 2),
        (SurgeryError("refused"), 3),
        (CheckFailed("too low"), 1),
        (Interrupted("stopped"), 130),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(32, "Broken pipe"), 0),
        (PermissionError(13, "Permission denied", "a.pt"), 2),
        (ZeroDivisionError("division by zero"), 70),
    ],
)
def test_how_a_run_ends(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("prunekit.cli.commands.eval._check", fail)
    assert run(["eval", "a.pt"]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 2
    assert bool(lines) == (status != 0)


def test_the_traceback_is_for_debug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("prunekit.cli.commands.eval._check", fail)
    assert run(["eval", "a.pt", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_notes_are_said_in_words() -> None:
    notes = {
        "negative_scales": 3,
        "merged": 0,
        "some_new_note": ["a", "b"],
        "never_ran": ["x"],
        "synthetic": {"images": 1000, "layers": 20},
    }
    pruned = types.SimpleNamespace(plan=Plan((), notes), difference=1e-7, seconds=0.1, verify_seconds=0.1)
    restored = "restored from synthetic images: images 1000, layers 20"
    *lines, proof = pruning._remarks(pruned)  # type: ignore[arg-type]
    assert lines == ["of these with a negative scale: 3", "some new note: a, b", restored]
    assert proof.startswith("masked and sliced agree")


@pytest.mark.parametrize(
    ("note", "line"),
    [
        ({"images": 9, "layers": 2, "left": {}}, "restored from images: images 9, layers 2"),
        (
            {"images": 9, "left": {"head": "its forward is not called"}},
            "restored from images: images 9, layers left as they were: head (its forward is not called)",
        ),
    ],
)
def test_a_note_within_a_note_is_said_only_where_it_says_something(note: dict[str, object], line: str) -> None:
    pruned = types.SimpleNamespace(plan=Plan((), {"calibration": note}), difference=0.0, seconds=0, verify_seconds=0)
    assert pruning._remarks(pruned)[0] == line  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "text"), [(0, "0 images"), (1, "1 image"), (1264, "1,264 images")])
def test_one_is_not_several(count: int, text: str) -> None:
    assert numbers.counted(count, "image") == text


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in the place of standard error, on which a bar shows at once."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("prunekit.report.terminal.progress._SECONDS_UNSEEN", 0)
    monkeypatch.setattr("prunekit.report.terminal.progress._SECONDS_BETWEEN_UPDATES", 0)
    return stream


def test_progress_on_a_terminal_is_a_bar_that_makes_way_for_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, output = terminal(monkeypatch), Output()
    output.progress("refitting [layers]", 1, 4)
    output.progress("proving", 0, 0)
    output.note("done")
    shown = screen.getvalue()
    assert "refitting [layers]" in shown
    assert "1/4" in shown
    assert "proving" in shown
    assert shown.rstrip().endswith("done")
    assert "\x1b[2K" in shown.rpartition("proving")[2], "the line is erased before another is written"
    output.settle()
    assert screen.getvalue() == shown
    output.progress("proving", 1, 2)
    output.settle()
    assert "1/2" in screen.getvalue()[len(shown) :]


@pytest.mark.parametrize("case", ["quiet", "dumb", "rank"])
def test_no_bar_where_none_is_wanted(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    if case == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if case == "rank":
        monkeypatch.setenv("RANK", "1")
    output = Output(quiet=case == "quiet")
    output.progress("proving", 1, 2)
    output.settle()
    assert not screen.getvalue()


def test_a_bar_goes_away_when_a_command_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        counter("reading")(1, 2)
        raise InputError("broken")

    screen = terminal(monkeypatch)
    monkeypatch.setattr("prunekit.cli.commands.convert.output_path", fails)
    assert run(["convert", "prunekit:vgg_digits", "-o", "a.pt"]) == 2
    shown = screen.getvalue()
    assert "reading" in shown
    assert "\x1b[2K" in shown.rpartition("reading")[2]
    assert "broken" in shown.rpartition("reading")[2]
