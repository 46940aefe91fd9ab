"""What people keep: comparisons, sweeps, sensitivity and pages, each checked against the figures it shows."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import schemas
from networks import lively
from prunekit import checkpoint, models, surgery
from prunekit.cli.app import run
from prunekit.cli.framework.fields import from_text
from prunekit.cli.sweep_arguments import read_ratios
from prunekit.data import open_data
from prunekit.errors import InputError, SurgeryError
from prunekit.evaluation.latency import Latency
from prunekit.evaluation.score import EvalResult, scored
from prunekit.methods import registry
from prunekit.methods.baselines.scores import filter_norms
from prunekit.plan import Keep, Plan
from prunekit.report import numbers
from prunekit.report.documents import dumps
from prunekit.report.pages import comparison, page
from prunekit.report.pictures import png, svg
from prunekit.report.pictures.chart import Axis, Chart, Point, ReferenceLine, Series
from prunekit.report.terminal import tables
from prunekit.report.terminal.inspection import describe_step
from prunekit.report.terminal.output import Output, _rendered
from prunekit.report.terminal.tables import csv_text, markdown, table
from prunekit.report.text import printable
from prunekit.spec import origin_of, remember
from prunekit.workflows.sensitivity import sensitivity
from prunekit.workflows.sweeps.points import Variant
from prunekit.workflows.sweeps.running import sweep

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network for the digits whose channels differ."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "net.pt"
    checkpoint.save(lively(models.build("vgg_digits", {"config": "8-8-M-16", "width": 1})).float(), path)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def document(capsys: Capture, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    schemas.check(found)
    return found


def refused(capsys: Capture, *arguments: object) -> str:
    """What a command says that must refuse its input, in two lines at most and with nothing on standard output."""
    capsys.readouterr()
    assert run([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) <= 2
    return captured.err


class Outside(HTMLParser):
    """Collects what a page would fetch or run, and checks that its tags match."""

    VOID = frozenset(("meta", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.look_at(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.look_at(tag, attrs)

    def look_at(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def opened(path: Path) -> str:
    """The text of a page that fetches nothing and runs nothing."""
    content = path.read_text(encoding="utf-8")
    found = Outside(content)
    assert not found.fetched
    assert not re.search(r"@import|url\(", content)
    return " ".join(found.text)


def test_a_comparison_in_every_form(network: Path, here: Path, capsys: Capture) -> None:
    assert run(["merge", str(network), "--ratio", ".5", "-o", "<small>.pt"]) == 0
    models = [network, "<small>.pt"]
    given = ["compare", *models, "--data", "digits", "--html", "c.html", "--picture", "c.png", "--threads", "1"]
    facts = document(capsys, *given)
    assert facts["schema"] == "prunekit.compare"
    assert facts["files"] == ["c.html", "c.png"]
    first, second = facts["results"]
    assert second["params"] < first["params"]
    text = opened(here / "c.html")
    assert f"{100 * second['accuracy']:.2f} %" in text
    assert "<small>.pt" in text
    assert (here / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "exists" in refused(capsys, *given)
    assert run(["compare", *map(str, models), "--no-latency", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["model"], int(row["params"])) for row in rows] == [(r["model"], r["params"]) for r in facts["results"]]
    assert rows[0]["accuracy"] == ""
    assert run(["compare", *map(str, models), "--no-latency", "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--picture", "c.gif"], "has the suffix '.gif'"),
        (["--picture", "c.png"], "needs images"),
        (["--html", "nowhere/c.html"], "there is no folder"),
        (["--format", "xml"], "unknown format 'xml'"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_a_comparison_that_cannot_be_shown_measures_nothing(
    flags: list[str], message: str, network: Path, here: Path, capsys: Capture
) -> None:
    assert message in refused(capsys, "compare", network, *flags)
    assert not list(here.iterdir())


def test_text_from_outside_is_text_on_a_page() -> None:
    nasty = '<script>alert("1")</script>&'
    content = page.page(nasty, [page.paragraph(nasty), page.table([nasty], [[nasty]]), page.bar(nasty, 1, 1)])
    found = Outside(content + svg.draw(Chart(nasty, Axis(nasty), Axis(nasty, nasty), _line(nasty), _reference(nasty))))
    assert not found.fetched
    assert nasty in found.text


def _line(name: str) -> tuple[Series, ...]:
    return (Series(name, (Point(1, 2, name, name, name),)), Series(name, (Point(1, 2, note=name),), "bars"))


def _reference(name: str) -> tuple[ReferenceLine, ...]:
    return ReferenceLine(name, 1.5), ReferenceLine(name, 1.5, "x")


def test_names_in_a_picture_are_text(here: Path) -> None:
    nasty = "_$\\frac{ 字"
    chart = Chart(nasty, Axis(nasty, nasty, names=(nasty,)), Axis(nasty), _line(nasty), _reference(nasty))
    png.draw([chart, chart], here / "a.svg", title=nasty)
    assert (here / "a.svg").read_text().count("frac") >= 2


@pytest.mark.parametrize(
    ("low", "high", "axis"),
    [
        (0.0, 2.6e6, Axis("MACs", written=numbers.count)),
        (1.000e9, 1.004e9, Axis("MACs", written=numbers.count)),
        (0.17, 0.25, Axis("latency", "ms", numbers.milliseconds)),
        (0.0, 40.0, Axis("layer", names=tuple(f"features.{i}.conv" for i in range(40)))),
        (1e-9, 2e-9, Axis("x")),
    ],
)
def test_ticks_neither_meet_nor_leave_the_paper(low: float, high: float, axis: Axis) -> None:
    chart = Chart("t", axis, axis, (Series("", (Point(low, low), Point(high, high))),))
    drawn = svg.draw(chart)
    assert drawn.count(f">{axis.title}</text>") == 2
    found = re.findall(r'<text x="([\d.]+)" y="294" text-anchor="middle">([^<]+)', drawn)
    ends = [(float(x) - 4 * len(text), float(x) + 4 * len(text)) for x, text in found]
    assert ends
    assert all(0 <= left < right <= 480 for left, right in ends)
    assert all(right < left for (_, right), (left, _) in pairwise(ends))
    beside = re.findall(r'text-anchor="end">([^<]+)', drawn)
    assert len(set(beside)) == len(beside)


@pytest.mark.parametrize(
    "values", [[(1.0, 1.0)], [(0.0, 0.0), (1e9, 100.0)], [(3.0, 98.1), (3.0, 98.2)], [(1e-9, -5.0)]]
)
def test_charts_keep_their_points_on_the_paper(values: list[tuple[float, float]]) -> None:
    points = tuple(Point(x, y, str(i)) for i, (x, y) in enumerate(values))
    drawn = svg.draw(Chart("t", Axis("x"), Axis("y"), (Series("a", points, "line"),)))
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle class="f0" cx="([^"]+)" cy="([^"]+)"', drawn)]
    assert len(places) == len(values)
    assert all(0 < x < 480 and 0 < y < 330 for x, y in places)
    assert len(set(places)) == len(values)


def test_labels_of_lines_that_cross_stand_clear_of_each_other() -> None:
    lines = (ReferenceLine("before the gates 98.88 % (validation)", 98.88), ReferenceLine("50%: 1.17 M", 1.17e6, "x"))
    points = (Point(0.4e6, 30.0), Point(1.17e6, 97.0), Point(2.4e6, 45.0))
    for crossing in (lines, lines[::-1]):
        drawn = svg.draw(Chart("t", Axis("x"), Axis("y"), (Series("", points),), crossing))
        heights = [float(y) for y in re.findall(r'<text class="over" x="[^"]+" y="([^"]+)"', drawn)]
        assert len(heights) == 2
        assert abs(heights[0] - heights[1]) > 14


@pytest.mark.parametrize("mark", ["", "1"])
@given(x=st.floats(0.0, 1.0), low=st.booleans())
def test_the_label_of_a_level_covers_no_marker_on_it(mark: str, x: float, low: bool) -> None:
    level, other = (0.0, 1.0) if low else (1.0, 0.0)
    points = (Point(0.0, other, mark), Point(x, level, mark), Point(1.0, other, mark))
    label = "model.pt 99.44 %"
    drawn = svg.draw(Chart("t", Axis("x"), Axis("y"), (Series("", points),), (ReferenceLine(label, level),)))
    end, base, anchor = re.findall(r'<text class="over" x="([^"]+)" y="([^"]+)" text-anchor="([a-z]+)"', drawn)[0]
    left = float(end) - (8 * len(label) if anchor == "end" else 0)
    markers = re.findall(r'<circle class="f0" cx="([^"]+)" cy="([^"]+)" r="(.)"', drawn)
    assert len(markers) == 3
    for across, down, radius in markers:
        beside = float(across) + int(radius) < left or float(across) - int(radius) > left + 8 * len(label)
        above_or_below = abs(float(base) - 5 - float(down)) > 6 + int(radius)
        assert beside or above_or_below


def test_history_rounds_what_was_computed() -> None:
    step = {"method": "train", "settings": {"lr": 0.03535533905932738, "epochs": 12, "sparsity": 1e-5}}
    assert describe_step(step) == "train, lr=0.03536, epochs=12, sparsity=1e-05"


def test_no_line_of_a_page_ends_between_a_figure_and_its_unit() -> None:
    text = "188 K MACs (−92 %), 2.35 ms, 3.45 MB; 4 Kinds, 12 bars"
    for part in (page.paragraph(text), page.cards([("", text)]), page.cards([(text, "")])):
        assert "188&nbsp;K MACs (−92&nbsp;%), 2.35&nbsp;ms, 3.45&nbsp;MB; 4 Kinds, 12 bars" in part


@pytest.mark.parametrize(("one_sided", "top"), [(True, 99.0), (False, 100.5)])
def test_a_bound_from_below_has_no_bar_above(here: Path, one_sided: bool, top: float) -> None:
    chart = Chart("t", Axis("x"), Axis("y"), (Series("", (Point(1.0, 99.0, spread=1.5, one_sided=one_sided),)),))
    assert chart.extent("y") == (97.5, top)
    assert svg.draw(chart).count("H") == (1 if one_sided else 2)
    png.draw([chart], here / "bar.svg")
    (bars,) = re.findall(
        r'id="LineCollection_\d+">\s*<path d="M \S+ (\S+) \s*L \S+ (\S+)', (here / "bar.svg").read_text()
    )
    assert len(set(bars)) == 2


def test_no_name_leaves_a_picture(here: Path) -> None:
    points = tuple(Point(x, 99.0 + 0.1 * x, name=f"net{x}") for x in range(6))
    png.draw([Chart("t", Axis("x"), Axis("y"), (Series("", (*points, Point(40, 80.0, name="last"))),))], here / "p.svg")
    drawn = (here / "p.svg").read_text()
    assert all(f"<!-- {point.name} -->" in drawn for point in points)


def test_a_comparison_shows_what_is_compared_with_and_the_spread_of_latency() -> None:
    results = [_timed("long/" * 9 + "a.pt", 2.0), dataclasses.replace(_timed("b.pt", 2.0), accuracy=0.8)]
    by_macs, by_latency = comparison.comparison_charts(results)
    assert [line.value for line in by_macs.references] == [90.0]
    assert by_macs.references[0].label.startswith("…")
    spread = results[0].latency_ms.spread  # type: ignore[union-attr]
    assert spread
    assert by_latency.extent("x") == (2.0 - spread, 2.0 + spread)
    assert svg.draw(by_latency).count("<path") == len(results)
    assert comparison.comparison_charts(results[:1])[0].references == ()


def test_tables_quote_what_would_break_them() -> None:
    assert markdown(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |"
    assert csv_text(["a", "b"], [['x,"y"', None]]) == 'a,b\n"x,""y""",\n'


NAMES = {
    "an escape sequence": "\x1b[2J\x1b[31mred",
    "a control of one byte": "\x9b31mred",
    "a bell and a return": "\a\rok",
    "two lines": "cat\ndog",
    "a turned direction": "\u202egnp.exe",
    "isolated directions": "\u2066a\u2069",
    "a line separator": "a\u2028b",
    "a formula": "=cmd|' /C calc'!A0",
    "a link formula": '+HYPERLINK("http://x")',
    "a function": "@SUM(A1)",
    "a minus": "-2+3",
    "a wide formula": "\uff1d1+1",
    "a picture": "<img src=x onerror=alert(1)>",
    "an end of a table": "</td></table><script>",
    "an attribute": '" onload="x',
    "rich markup": "[bold]a[/bold]",
    "a rich link": "[link=http://x]a[/link]",
    "a lone closing tag": "a[/]",
    "a markdown link": "[a](http://x)",
    "a markdown image": "![a](http://x)",
    "code": "`a`",
    "a bar": "a|b",
    "a backslash": "a\\",
    "mathematics": "$\\frac$ and $x$",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_are_shown_and_nothing_else(name: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    output, shown = Output(), printable(name)
    output.table(table([name, "n"], [[name, "1"]]), data=False)
    output.note(name)
    output.warn(name)
    output.error(name, name)
    for line in (lines := capsys.readouterr().err.splitlines()):
        assert line.isprintable()
    assert sum(shown in line for line in lines) >= (2 if set(name) & set("\n\r\u2028") else 6)

    (row,) = list(csv.reader(io.StringIO(csv_text(["a"], [[name]]))))[1:]
    assert row[0].isprintable()
    assert row[0].lstrip("'") == shown
    assert row[0][0] not in "=+-@\uff1d"

    rendered = markdown(["a"], [[name]]).splitlines()
    assert len(rendered) == 3
    assert not re.search(r"(?<!\\)[\[\]`]|<|(?<!\\)(?<!\\\\)\|.*[^ ]\|", rendered[2][1:-1])

    document = json.loads(dumps({name: name}))
    assert document == {name: name}
    assert dumps({name: name}).replace("\n", "").isprintable()


def named_chart(name: str) -> Chart:
    point = Point(1, 1, "1", name, name)
    return Chart(name, Axis(name, names=(name, name, name)), Axis(name), (Series(name, (point,)),))


class Everything(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_are_text_in_pages_and_charts(name: str) -> None:
    drawn = svg.draw(named_chart(name))
    whole = page.page(name, [page.heading(name), page.paragraph(name), page.cards([(name, name)]), drawn])
    whole += (
        page.table([name], [[name]]) + page.bar(name, 1, 1) + page.folded(name, "") + svg.legend([Series(name, ())])
    )
    found = Everything()
    found.feed(whole)
    assert not found.tags & {"img", "script"}
    assert not found.attributes & {"onerror", "onload"}
    assert sum(printable(name) in text for text in found.texts) >= 8
    assert whole.replace("\n", "").isprintable()


def test_pictures_take_names_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = [name for name in NAMES.values() if printable(name).isascii()]
    png.draw([named_chart(name) for name in names[::4]], tmp_path / "names.png", title=NAMES["mathematics"])


def test_a_hostile_file_is_inspected_in_peace(network: Path, here: Path, capsys: Capture) -> None:
    model = checkpoint.load(network)
    origin = origin_of(model)
    assert origin is not None
    names = tuple(NAMES.values())
    history = tuple({"method": name, name: name} for name in names)
    remember(model, dataclasses.replace(origin, classes=names, history=history))
    checkpoint.save(model, here / "hostile.pt")
    assert run(["inspect", "hostile.pt", "--html", "page.html"]) == 0
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).splitlines())
    assert not re.search("<img|<script|</td></table>", (here / "page.html").read_text().replace("</td></tr>", ""))
    assert (here / "page.html").read_text().replace("\n", "").isprintable()


def test_a_sweep_goes_on_where_it_stopped(
    network: Path, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["sweep", network, "--data", "digits", "--no-latency", "--method", "merge:restore=none", "-o", "s.json"]
    from prunekit import api

    genuine, calls = api.prune, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["config"].ratio)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*args, **kwargs)

    monkeypatch.setattr(api, "prune", interrupted)
    ratios = ["--ratios", "0.2:0.8:0.2"]
    assert run([*map(str, given), *ratios]) == 130
    assert len(json.loads((here / "s.json").read_text())["points"]) == 2
    assert "--resume" in refused(capsys, *given, *ratios)
    facts = document(capsys, *given, *ratios, "--resume", "--picture", "s.svg", "--html", "s.html")
    assert calls == [0.2, 0.4, 0.6, 0.6, 0.8]
    assert [point["ratio"] for point in facts["points"]] == [0.2, 0.4, 0.6, 0.8]
    assert json.loads((here / "s.json").read_text()) == facts
    whole = document(capsys, *given[:-1], "whole.json", *ratios)
    assert [p["result"] for p in whole["points"]] == [p["result"] for p in facts["points"]]
    assert "<svg" in (here / "s.svg").read_text()
    assert "merge:none" in opened(here / "s.html")


def test_a_sweep_measures_what_the_commands_measure(network: Path, capsys: Capture) -> None:
    given = ["--data", "digits", "--no-latency"]
    methods = [name for name in registry.names() if not registry.get(name).inside_heads]
    every = ",".join(methods)
    facts = document(
        capsys, "sweep", network, *given, "--ratios", "0.5", "--calibration", "200", "--methods", every, "-o", "s.json"
    )
    assert [point["method"] for point in facts["points"]] == methods
    for point in facts["points"]:
        target = f"{point['method']}.pt"
        images = ["--data", "digits", "--calibration", "200"]
        assert run([point["method"], str(network), "--ratio", "0.5", *images, "-o", target, "-q"]) == 0
        alone = document(capsys, "eval", target, *given)
        for key in ("accuracy", "loss", "params", "macs"):
            assert point["result"][key] == alone[key], point["method"]


def test_a_sweep_of_another_network_is_not_gone_on_with(network: Path, here: Path, capsys: Capture) -> None:
    given = ["--no-latency", "--ratios", "0.5", "--method", "merge", "-o", "s.json"]
    document(capsys, "sweep", network, *given)
    assert "a sweep of other weights" in refused(capsys, "sweep", "prunekit:vgg_digits", *given, "--resume")
    assert "of other data" in refused(capsys, "sweep", network, *given, "--data", "digits", "--resume")
    (here / "s.json").write_text("{}")
    assert "not a sweep that could go on" in refused(capsys, "sweep", network, *given, "--resume")


def test_what_a_method_refuses_is_a_point_without_figures() -> None:
    model = models.build("lenet_300_100")
    points = sweep(model, [Variant("slim"), Variant("merge")], [0.5], lambda small, name: _measured(small, name))
    assert [point.result is None for point in points] == [True, False]
    assert points[0].error is not None
    assert "batch norm" in points[0].error


def _measured(model: torch.nn.Module, name: str) -> Any:
    from prunekit.evaluation.score import evaluate

    return evaluate(model, name=name)


@pytest.mark.parametrize(
    ("text", "ratios"),
    [("0.5", [0.5]), (".2, 0.1,.2", [0.1, 0.2]), ("0.1:0.9:0.2", [0.1, 0.3, 0.5, 0.7, 0.9]), ("0.25:0.5:1", [0.25])],
)
def test_ratios(text: str, ratios: list[float]) -> None:
    assert list(read_ratios(text)) == ratios


@pytest.mark.parametrize(
    "text", ["", "half", "0", "1", "1.5", "0.1:0.9", "0.1:0.9:0", "0.1:0.9:-1", "nan", "0.1:inf:0.1"]
)
def test_ratios_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="shares between 0 and 1"):
        read_ratios(text)


def test_settings_in_a_text_have_the_types_of_their_fields() -> None:
    config = registry.get("merge").Config
    assert from_text(config, "restore=none,lambda=1,min-channels=2") == {
        "restore": "none",
        "lam": 1.0,
        "min_channels": 2,
    }
    for text, message in (
        ("criterio=l1-norm", "unknown setting"),
        ("lambda", "not a setting"),
        ("lambda=x", "a number"),
    ):
        with pytest.raises(InputError, match=message):
            from_text(config, text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "merg"], "unknown method 'merg'"),
        (["--method", "merge:ratio=.5"], "--ratios says that"),
        (["--method", "merge:criterion=l3"], "unknown criterion"),
        (["--ratios", "0.001:0.999:0.0005"], "points are more than"),
        (["-o", "-"], "keeps its points in a file"),
        (["-o", "nowhere/s.json"], "there is no folder"),
        (["--picture", "s.png"], "needs images"),
    ],
)
def test_bad_sweeps(flags: list[str], message: str, network: Path, here: Path, capsys: Capture) -> None:
    assert message in refused(capsys, "sweep", network, *flags)
    assert not list(here.iterdir())


def test_sensitivity_is_the_accuracy_without_the_smallest_filters(network: Path) -> None:
    model, images = checkpoint.load(network), open_data("digits", "test")
    graph = surgery.trace(model, torch.zeros(1, 1, 8, 8))
    found = {group.group: group for group in sensitivity(model, graph, images, (0.25, 0.5))}
    assert set(found) == {"features.0", "features.3", "features.7"}
    weight = model.get_submodule("features.3").weight
    norms = weight.detach().double().abs().sum((1, 2, 3))
    group = graph.group("features.3")
    torch.testing.assert_close(torch.from_numpy(filter_norms(model, group)), norms)
    kept = norms.argsort(stable=True)[2:].sort().values.tolist()
    small = surgery.edit(model, Plan([Keep("features.3", kept)]), graph)
    assert found["features.3"].removed == (2, 4)
    assert found["features.3"].accuracy[0] == scored(small, images).accuracy


def test_inspect_shows_what_layers_are_worth_when_restored(network: Path, here: Path, capsys: Capture) -> None:
    given = ["inspect", str(network), "--sensitivity", "--data", "digits", "--images", "100", "--ratios", ".5,.75"]
    plain = document(capsys, *given)["sensitivity"]["groups"]
    restored = document(capsys, *given, "--restored", "--html", "i.html")["sensitivity"]["groups"]
    assert all(group["loss"] is None for group in plain)
    assert all(0 < half < most for half, most in (group["loss"] for group in restored))
    assert [group["accuracy"] for group in restored] != [group["accuracy"] for group in plain]
    assert "lost −75%" in opened(here / "i.html")
    assert run([*given, "--restored"]) == 0
    assert "lost −75%" in capsys.readouterr().out


def test_inspect_shows_sensitivity_and_widths_before(network: Path, here: Path, capsys: Capture) -> None:
    assert run(["merge", str(network), "--ratio", ".5", "--widths", "uniform", "-o", "small.pt"]) == 0
    given = ["inspect", "small.pt", "--sensitivity", "--data", "digits", "--images", "100", "--ratios", ".5"]
    facts = document(capsys, *given, "--html", "i.html")
    assert facts["sensitivity"]["images"] == 100
    assert facts["original"]["widths"]["features.3"] == 8
    assert facts["original"]["params"] == sum(p.numel() for p in checkpoint.load(network).parameters())
    text = opened(here / "i.html")
    assert "4 of 8" in text
    assert "10 frozen: the model's output" in text
    assert run(given) == 0
    assert "4 of 8" in capsys.readouterr().out
    assert document(capsys, "inspect", network)["original"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sensitivity"], "needs images"),
        (["--data", "digits"], "is for --sensitivity"),
        (["--restored"], "is for --sensitivity"),
        (["--sensitivity", "--data", "digits", "--ratios", "2"], "between 0 and 1"),
        (["--sensitivity", "--data", "digits", "--images", "0"], "--images must be at least 1"),
    ],
)
def test_bad_inspections(flags: list[str], message: str, network: Path, capsys: Capture) -> None:
    assert message in refused(capsys, "inspect", network, *flags)


def test_nothing_to_be_sensitive_about() -> None:
    model = torch.nn.Linear(3, 2)
    graph = surgery.trace(model, torch.zeros(1, 3))
    with pytest.raises((InputError, SurgeryError), match="no channels"):
        sensitivity(model, graph, open_data("digits", "test"))


@given(
    width=st.integers(40, 120),
    names=st.lists(st.text("abcdefgh/._-", min_size=1, max_size=60), min_size=1, max_size=4),
    figures=st.lists(st.integers(0, 10**12), min_size=1, max_size=10),
)
def test_no_width_breaks_a_figure(width: int, names: list[str], figures: list[int]) -> None:
    """At every width each figure and each column stands in one line, and no line is longer than the terminal."""
    columns = ["model", *(f"column {letter}" for letter, _ in zip("abcdefghij", figures, strict=False))]
    rows = [(name, *(f"{figure + row:,} −52 %" for figure in figures)) for row, name in enumerate(names)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        text = _rendered(table(columns, rows, title="a title"), io.StringIO())
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert all(any(cell in line for line in lines) for cell in columns)
    for row in rows:
        for cell in row[1:]:
            assert any(re.search(rf"(?<![\d,]){re.escape(cell)}(?!\S)", line) for line in lines), cell
    assert text.count("a title") == 1


def test_off_a_terminal_a_table_is_as_wide_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    columns = [f"column {number}" for number in range(40)]
    text = _rendered(table(columns, [["1,234"] * 40]), io.StringIO())
    assert len([line for line in text.splitlines() if line]) == 3


def _timed(name: str, p50: float, macs: int | None = 1000) -> EvalResult:
    timing = Latency(p50, 2 * p50, 1, 1, "cpu", 20, p25=p50 - 0.02, p75=p50 + 0.04)
    return EvalResult(name, 0.9, None, 0.1, 10, 100, macs, 400, timing)


def test_latency_stands_with_its_spread_and_its_noise_is_named() -> None:
    columns, rows = tables.result_cells([_timed("a", 0.43)])
    assert rows[0][columns.index("latency")] == "0.43 ms ± 0.03"
    note = tables.latency_note([_timed("a", 0.43), _timed("b", 0.38), _timed("c", 0.2, macs=10)])
    assert note is not None
    assert "a 0.43 ms, b 0.38 ms" in note
    assert tables.latency_note([_timed("a", 0.43), _timed("b", 0.38, macs=999)]) is None
    assert tables.latency_note([_timed("a", 0.43, macs=None), _timed("b", 0.38, macs=None)]) is None


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (2.346, 0.08, "2.35 ms ± 0.08"),
        (0.271, 0.004, "0.27 ms"),
        (0.271, 0.0051, "0.27 ms ± 0.01"),
        (13.7, None, "13.7 ms"),
    ],
)
def test_a_spread_stands_where_it_shows(value: float, half: float | None, text: str) -> None:
    assert numbers.spread(value, half) == text
