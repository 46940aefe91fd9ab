"""Networks side by side: a page, and the charts of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit.metric import ACCURACY
from prunekit.report import numbers
from prunekit.report.pages import page
from prunekit.report.pages.classes import class_parts
from prunekit.report.pictures import svg
from prunekit.report.pictures.chart import Axis, Chart, Point, ReferenceLine, Series, drawn, score_axis
from prunekit.report.terminal.tables import latency_note, result_cells

if TYPE_CHECKING:
    from prunekit.evaluation.score import EvalResult


_LETTERS = 24  # of a name beside a line


def comparison_page(title: str, results: Sequence[EvalResult], about: str) -> str:
    """Return one page: the table, the score against MACs and against latency where measured, and the classes."""
    columns, rows = result_cells(results)
    numbered = [(str(number), *row) for number, row in enumerate(rows, start=1)]
    drawn = [svg.draw(chart) for chart in comparison_charts(results)]
    parts = [page.paragraph(about), page.table(["", *columns], numbered, left=2)]
    if note := latency_note(results):
        parts.append(page.paragraph(note))
    return page.page(title, [*parts, *([page.charts(drawn)] if drawn else []), *class_parts(results)])


def comparison_charts(results: Sequence[EvalResult]) -> list[Chart]:
    """Return the score against MACs and against latency, where measured; points are numbered as in the table."""
    charts, metric = list[Chart](), results[0].metric or ACCURACY
    for axis, figures in (
        (Axis("MACs", written=numbers.count), [(r.macs, 0.0) for r in results]),
        (Axis("latency", "ms"), [_timed(r) for r in results]),
    ):
        points = tuple(
            Point(x, drawn(metric, r.score), str(number), r.model, _note(r, axis, x), spread_x=spread)
            for number, (r, (x, spread)) in enumerate(zip(results, figures, strict=True), start=1)
            if r.score is not None and x is not None
        )
        if points:
            title = f"{metric.title} against {axis.label}"
            charts.append(Chart(title, axis, score_axis(metric), (Series("", points),), _first(results)))
    return charts


def _timed(result: EvalResult) -> tuple[float | None, float]:
    """Return the median latency and its spread, in milliseconds."""
    timing = result.latency_ms
    return (timing.p50, timing.spread or 0.0) if timing else (None, 0.0)


def _first(results: Sequence[EvalResult]) -> tuple[ReferenceLine, ...]:
    """Return a line at the score of the first network, which the others are compared with."""
    score, metric = results[0].score, results[0].metric
    if score is None or metric is None or len(results) < 2:
        return ()
    name = results[0].model
    short = name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"
    return (ReferenceLine(f"{short} {numbers.score(metric, score)}", drawn(metric, score)),)


def _note(result: EvalResult, axis: Axis, figure: float) -> str:
    score = numbers.score(result.metric, result.score)
    return f"{result.model}: {score}, {axis.label} {axis.written(figure)} {axis.unit}".strip()
