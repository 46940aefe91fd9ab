"""A sweep as a table, a page, and the charts of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.pages import page
from prunekit.report.pictures import svg
from prunekit.report.pictures.chart import Axis, Chart, Point, ReferenceLine, Series
from prunekit.report.terminal import tables

if TYPE_CHECKING:
    from prunekit.evaluation.score import EvalResult
    from prunekit.report.terminal.output import Output
    from prunekit.workflows.sweeps import SweepPoint

_COLUMNS = ("method", "ratio", "accuracy", "parameters", "MACs", "size", "latency")


def show_sweep(output: Output, base: EvalResult, points: Sequence[SweepPoint], format: str) -> None:
    """Write all points to standard output, the unpruned network first."""
    if format == "csv":
        flat = tables.flat(base)
        rows = [["", 0.0, *flat.values(), None]]
        rows += [
            [p.label, p.ratio, *(tables.flat(p.result).values() if p.result else [None] * len(flat)), p.error]
            for p in points
        ]
        output.data(tables.csv_text(["method", "ratio", *flat, "error"], rows))
    elif format == "markdown":
        output.data(tables.markdown(*_cells(base, points)))
    else:
        output.table(tables.table(*_cells(base, points)), data=True)


def sweep_page(title: str, base: EvalResult, points: Sequence[SweepPoint]) -> str:
    """Return one page: the curves, then every figure."""
    charts = sweep_charts(base, points)
    columns, rows = _cells(base, points)
    parts = [page.charts([svg.draw(chart) for chart in charts]), svg.legend(charts[0].series)] if charts else []
    return page.page(title, [*parts, page.heading("All points"), page.table(columns, rows)])


def sweep_charts(base: EvalResult, points: Sequence[SweepPoint]) -> list[Chart]:
    """Return accuracy against the ratio and against MACs, a line per method; none without accuracies."""
    if base.accuracy is None or not any(p.result and p.result.accuracy is not None for p in points):
        return []
    unpruned = ReferenceLine(f"unpruned {numbers.percent(base.accuracy)}", 100 * base.accuracy)
    axes = (Axis("ratio", "share of channels removed"), Axis("MACs", written=numbers.count))
    return [
        Chart(f"Accuracy against {axis.label}", axis, Axis("accuracy", "%"), _curves(base, points, axis), (unpruned,))
        for axis in axes
    ]


def _curves(base: EvalResult, points: Sequence[SweepPoint], against: Axis) -> tuple[Series, ...]:
    """Return the points of each method by ratio, beginning at the unpruned network."""
    curves: dict[str, list[Point]] = {}
    for point in points:
        if point.result is not None and point.result.accuracy is not None:
            start = [_place(base, 0.0, "unpruned", against)]
            note = f"{point.label}, ratio {point.ratio:g}"
            curves.setdefault(point.label, start).append(_place(point.result, point.ratio, note, against))
    return tuple(Series(label, tuple(places), "line") for label, places in curves.items())


def _place(result: EvalResult, ratio: float, note: str, against: Axis) -> Point:
    accuracy = 100 * (result.accuracy or 0.0)
    x = ratio if against.label == "ratio" else float(result.macs or 0)
    return Point(x, accuracy, note=f"{note}: {accuracy:.2f} %, {numbers.count(result.macs)} MACs")


def _cells(base: EvalResult, points: Sequence[SweepPoint]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the columns and rows of the table; a column without any figure is left out."""
    rows = [
        ("unpruned", "", *_figures(base, base)),
        *((p.label, f"{p.ratio:g}", *_figures(base, p.result)) for p in points),
    ]
    shown = [i for i in range(len(_COLUMNS)) if any(row[i] not in (numbers.NONE, "") for row in rows)]
    return [_COLUMNS[i] for i in shown], [tuple(row[i] for i in shown) for row in rows]


def _figures(base: EvalResult, result: EvalResult | None) -> tuple[str, ...]:
    if result is None:
        return (numbers.NONE,) * 5
    return (
        numbers.percent(result.accuracy),
        tables.against(base.params, result.params, f"{result.params:,}"),
        tables.against(base.macs, result.macs, numbers.count(result.macs)),
        numbers.data_size(result.bytes),
        numbers.milliseconds(result.latency_ms.p50 if result.latency_ms else None),
    )
