"""Networks side by side: a page, and the charts of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.pages import page
from prunekit.report.pages.classes import class_parts
from prunekit.report.pictures import svg
from prunekit.report.pictures.chart import Axis, Chart, Point, Series
from prunekit.report.terminal.tables import latency_note, result_cells

if TYPE_CHECKING:
    from prunekit.evaluation.score import EvalResult


def comparison_page(title: str, results: Sequence[EvalResult], about: str) -> str:
    """Return one page: the table, accuracy against MACs and against latency where measured, and the classes."""
    columns, rows = result_cells(results)
    numbered = [(str(number), *row) for number, row in enumerate(rows, start=1)]
    drawn = [svg.draw(chart) for chart in comparison_charts(results)]
    parts = [page.paragraph(about), page.table(["", *columns], numbered, left=2)]
    if note := latency_note(results):
        parts.append(page.paragraph(note))
    return page.page(title, [*parts, *([page.charts(drawn)] if drawn else []), *class_parts(results)])


def comparison_charts(results: Sequence[EvalResult]) -> list[Chart]:
    """Return accuracy against MACs and against latency, where measured; points are numbered as in the table."""
    charts = []
    for axis, figures in (
        (Axis("MACs", written=numbers.count), [r.macs for r in results]),
        (Axis("latency", "ms"), [r.latency_ms.p50 if r.latency_ms else None for r in results]),
    ):
        points = tuple(
            Point(x, 100 * r.accuracy, str(number), r.model, _note(r, f"{axis.label} {axis.written(x)} {axis.unit}"))
            for number, (r, x) in enumerate(zip(results, figures, strict=True), start=1)
            if r.accuracy is not None and x is not None
        )
        if points:
            title = f"Accuracy against {axis.label}"
            charts.append(Chart(title, axis, Axis("accuracy", "%"), (Series("", points),)))
    return charts


def _note(result: EvalResult, figure: str) -> str:
    return f"{result.model}: {numbers.percent(result.accuracy)}, {figure.strip()}"
