"""Charts as files, drawn by Matplotlib (the extra `pictures`), and the charts of a pruning: gammas, widths, passes."""

from __future__ import annotations

import itertools
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.errors import InputError
from prunekit.files.writing import atomic_write
from prunekit.report import numbers
from prunekit.report.pictures.chart import (
    SHAPES,
    Axis,
    Chart,
    Point,
    ReferenceLine,
    Series,
    apart,
    drawn,
    score_axis,
    ticks,
)
from prunekit.report.provenance import made
from prunekit.report.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from prunekit.workflows.passes import PassResult

_PICTURES = (".png", ".svg", ".pdf")
_COLOURS = ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#0c8599", "#a61e4d")
_MUTED = "#9aa5b1"
_SOFT = "#5b6775"
_MARKERS = "os^D"
_LETTERS_AN_INCH = 13  # of the small print below
_TITLE_LETTERS_AN_INCH = 9
_BINS = 60
_ROW = 0.04  # of the height of a plot: a line of names
_MANY = 100  # points, above which markers are small
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # behind names, over lines
_LETTERS = 60  # names that fit along an axis
MACS = Axis("MACs", written=numbers.count)


def require_matplotlib() -> Any:
    """Return Matplotlib's object-oriented `Figure`, which needs no display.

    Raises:
        InputError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need Matplotlib", hint="pip install 'prunekit[pictures]'") from error
    return Figure


def check_picture(path: str) -> None:
    """Raise `InputError` where Matplotlib is missing or cannot write such a file."""
    require_matplotlib()
    suffix = Path(path).suffix.lower()
    if suffix not in _PICTURES:
        raise InputError(f"{Path(path).name} has the suffix '{suffix}'", hint=f"pictures are {', '.join(_PICTURES)}")


def gammas_of(model: nn.Module) -> torch.Tensor:
    """Return |gamma| of every batch norm, `(channels,)`."""
    scales = [m.weight.detach().abs().flatten() for m in model.modules() if isinstance(m, _BatchNorm) and m.affine]
    return torch.cat(scales).cpu() if scales else torch.zeros(0)


def gammas_chart(before: torch.Tensor, after: torch.Tensor, threshold: float | None) -> Chart:
    """Return histograms of |gamma| before and after, with the threshold that separates removed from kept channels."""
    top = float(max([t.max() for t in (before, after) if t.numel()], default=torch.tensor(1.0))) or 1.0

    def counted(values: torch.Tensor) -> tuple[Point, ...]:
        counts = torch.histc(values.double(), _BINS, 0, top).tolist()
        return tuple(Point((i + 0.5) * top / _BINS, count) for i, count in enumerate(counts))

    series = (Series("before", counted(before), "bars", muted=True), Series("after", counted(after), "steps"))
    lines = () if threshold is None else (ReferenceLine(f"threshold {threshold:.3g}", threshold, "x"),)
    return Chart("Batch-norm scales", Axis("|gamma|"), Axis("channels"), series, lines)


def widths_chart(before: Mapping[str, int], after: Mapping[str, int]) -> Chart:
    """Return the output channels of each layer before and after, in execution order."""
    now = tuple(Point(i, after.get(name, 0)) for i, name in enumerate(before))
    then = tuple(Point(i, width) for i, width in enumerate(before.values()))
    series = (Series("before", then, "bars", width=0.8, muted=True), Series("after", now, "bars", width=0.5))
    return Chart("Widths", Axis("layer", names=tuple(before)), Axis("channels"), series)


def passes_chart(passes: Sequence[PassResult], before: float) -> Chart:
    """Return the score against MACs over the passes, right after pruning and after tuning."""
    metric = passes[0].metric
    start = Point(passes[0].before.macs, drawn(metric, before), note="before")
    tuned = (start, *(Point(p.after.macs, drawn(metric, p.score_tuned)) for p in passes))
    pruned = tuple(Point(p.after.macs, drawn(metric, p.score_pruned)) for p in passes)
    series = (Series("tuned", tuned, "line"), Series("right after pruning", pruned, muted=True))
    unpruned = ReferenceLine(f"unpruned {numbers.score(metric, before)}", drawn(metric, before))
    across = Axis("MACs", written=numbers.count, descending=True)
    return Chart(f"{metric.title} over the passes", across, score_axis(metric), series, (unpruned,))


def draw(charts: Sequence[Chart], path: Path, *, title: str = "", about: str = "", force: bool = True) -> None:
    """Write the charts side by side as one picture, in the format of the suffix of `path`.

    Below them stands what the figures are `about`, with the version and the date.

    Raises:
        InputError: Matplotlib is missing, or the file cannot be written.
    """
    widths = [max(6.0, min(0.22 * len(chart.x.names), 40.0)) for chart in charts]
    figure = require_matplotlib()(figsize=(sum(widths), 4.4), layout="constrained")
    line = "; ".join(filter(None, (about, made())))
    figure.supxlabel(textwrap.fill(_text(line), round(sum(widths) * _LETTERS_AN_INCH)), fontsize=8, color=_SOFT)
    if title:
        figure.suptitle(textwrap.fill(_text(title), round(sum(widths) * _TITLE_LETTERS_AN_INCH)))
    grid = figure.subplots(1, len(charts), squeeze=False, width_ratios=widths)[0]
    for axes, chart in zip(grid, charts, strict=True):
        _draw(axes, apart(chart))
    kind = path.suffix.lower().removeprefix(".")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names in scripts that the font lacks
        atomic_write(path, lambda stream: figure.savefig(stream, dpi=120, format=kind), force=force)


def _draw(axes: Axes, chart: Chart) -> None:
    axes.set(xlabel=_text(chart.x.title), ylabel=_text(chart.y.title), title=_text(chart.title))
    axes.spines[["top", "right"]].set_visible(False)
    bright = itertools.count()
    for series in chart.series:
        if series.muted:
            _add(axes, series, _MUTED, _MARKERS[0])
        else:
            number = next(bright)
            _add(axes, series, _COLOURS[number % len(_COLOURS)], _MARKERS[number % SHAPES])
    for line in chart.references:
        across = axes.axhline if line.along == "y" else axes.axvline
        across(line.value, color="black", linestyle="--", linewidth=1, label=_text(line.label))
    _write_ticks(axes, chart)
    _annotate(axes, chart.points)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(edgecolor="none")


def _add(axes: Axes, series: Series, colour: str, marker: str) -> None:
    xs, ys = [p.x for p in series.points], [p.y for p in series.points]
    label = _text(series.name) or None
    if series.form == "bars":
        axes.bar(xs, ys, width=series.step * series.width, color=colour, label=label)
    elif series.form == "steps":
        edges = [xs[0] - series.step / 2, *(x + series.step / 2 for x in xs)]
        axes.stairs(ys, edges, color=colour, label=label, linewidth=1.6)
    else:
        size, alpha = (6.0, 1.0) if len(xs) < _MANY else (2.0, 0.4)
        style = f"{marker}-" if series.form == "line" else marker
        axes.plot(xs, ys, style, color=colour, label=label, markersize=size, alpha=alpha)
        reaches = [(p.spread, p.spread_up) if p.spread else (math.nan, math.nan) for p in series.points]
        up = list(zip(*reaches, strict=True))
        across = [p.spread_x or math.nan for p in series.points]
        axes.errorbar(xs, ys, up, across, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3)


def _write_ticks(axes: Axes, chart: Chart) -> None:
    """Write the same ticks as on a page; names are vertical, and none is left out."""
    for axis, side, (low, high) in ((chart.x, axes.xaxis, axes.get_xlim()), (chart.y, axes.yaxis, axes.get_ylim())):
        if axis.names:
            side.set_ticks(range(len(axis.names)), [_text(name) for name in axis.names], rotation=90, fontsize=6)
        else:
            found = ticks(low, high, axis, lambda found: sum(len(text) + 2 for _, text in found) <= _LETTERS)
            side.set_ticks([value for value, _ in found], [_text(text) for _, text in found])
    if chart.x.descending:
        axes.invert_xaxis()


def _annotate(axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's name beside it: stacked where points lie together, to the left at the right end."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for point in sorted((p for p in points if p.name), key=lambda p: p.y):
        across, up = (point.x - left) / (right - left), (point.y - low) / (high - low)
        up = _free_row(
            up + (_ROW if point.spread_x else 0.0), [row for place, row in taken if abs(across - place) < 0.2]
        )
        taken.append((across, up))
        side = "right" if across > 0.75 else "left"
        place = (point.x + (right - left) * (-0.015 if side == "right" else 0.015), low + up * (high - low))
        axes.annotate(_text(point.name), place, fontsize=8, ha=side, va="center", bbox=_PAPER)


def _free_row(up: float, taken: Sequence[float]) -> float:
    """Return the height (0 to 1) nearest to `up`, within the plot and a line from all `taken`; `up` if there is none.

    Matplotlib draws no note whose place lies outside the plot.
    """
    rows = sorted((up + step * _ROW for step in range(-25, 26)), key=lambda row: abs(row - up))
    free = (row for row in rows if 0 <= row <= 1 and all(abs(row - other) > 0.9 * _ROW for other in taken))
    return next(free, up)


def _text(name: str) -> str:
    """Escape a name: Matplotlib reads $ as mathematics, and hides labels that begin with an underscore."""
    escaped = printable(name).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped
