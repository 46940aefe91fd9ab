"""Networks side by side as a document: a page, and the panels of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit.report import numbers, page, svg
from prunekit.report.classes import class_parts
from prunekit.report.tables import result_cells

if TYPE_CHECKING:
    from prunekit.evaluation import EvalResult
    from prunekit.report.pictures import Panel


def comparison_page(title: str, results: Sequence[EvalResult], about: str) -> str:
    """One page: the table, accuracy against MACs and against latency where these were measured, and the classes."""
    columns, rows = result_cells(results)
    numbered = [(str(number), *row) for number, row in enumerate(rows, start=1)]
    axis = svg.Axis("accuracy (%)", lambda value: f"{value:g}")
    pictures = []
    for label, written, figures in _figures(results):
        points = tuple(
            svg.Point(x, 100 * r.accuracy, str(number), f"{r.model}: {numbers.percent(r.accuracy)}, {written(x)}")
            for number, (r, x) in enumerate(zip(results, figures, strict=True), start=1)
            if r.accuracy is not None and x is not None
        )
        pictures.append(
            svg.chart(f"Accuracy (%) against {label}", svg.Axis(label, written), axis, [svg.Series("", points)])
        )
    parts = [page.paragraph(about), page.table(["", *columns], numbered, left=2)]
    drawn = [picture for picture in pictures if picture]
    return page.page(title, [*parts, *([page.charts(drawn)] if drawn else []), *class_parts(results)])


def comparison_panels(results: Sequence[EvalResult]) -> list[Panel]:
    """For Matplotlib: accuracy against MACs (millions) and against latency (milliseconds)."""
    panels: list[Panel] = []
    for label, figures in (
        ("MACs (millions)", [r.macs / 1e6 for r in results]),
        ("latency (ms)", [r.latency_ms.p50 if r.latency_ms else None for r in results]),
    ):
        points = [
            (x, 100 * r.accuracy, r.model)
            for r, x in zip(results, figures, strict=True)
            if r.accuracy is not None and x is not None
        ]
        if points:
            panels.append((label, [("", points)]))
    return panels


def _figures(results: Sequence[EvalResult]) -> list[tuple[str, numbers.Written, list[float | None]]]:
    latencies = [r.latency_ms.p50 if r.latency_ms else None for r in results]
    return [("MACs", numbers.count, [float(r.macs) for r in results]), ("latency", numbers.milliseconds, latencies)]
