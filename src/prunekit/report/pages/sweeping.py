"""A sweep as a page, and the charts of a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.pages import page
from prunekit.report.pictures import svg
from prunekit.report.pictures.chart import Axis, Chart, Point, ReferenceLine, Series
from prunekit.report.provenance import measured_on
from prunekit.report.terminal.sweeping import failures, recommended, sweep_cells
from prunekit.workflows.sweeps.points import written

if TYPE_CHECKING:
    from prunekit.workflows.sweeps.summary import Summary, Sweep

_RATIO = Axis("ratio", "share of channels removed")
_MACS = Axis("MACs", "for one image", written=numbers.count)
_PARAMS = Axis("parameters", written=numbers.count)
# What accuracy is drawn against, by the axis of the sweep.
_AGAINST = {
    "ratio": (_RATIO, _MACS),
    "target_macs": (_MACS,),
    "target_params": (_PARAMS, _MACS),
    "target_latency": (_MACS,),
}


def sweep_page(title: str, sweep: Sweep) -> str:
    """Return one page: the curves, what is recommended, and every figure."""
    charts = sweep_charts(sweep)
    drawn = [page.charts([svg.draw(chart) for chart in charts]), svg.legend(charts[0].series)] if charts else []
    words = [page.paragraph(line) for line in (recommended(sweep), *failures(sweep))]
    parts = [*drawn, *words, page.heading("Figures"), page.table(*sweep_cells(sweep))]
    return page.page(title, parts, about=sweep_about(sweep))


def sweep_about(sweep: Sweep) -> str:
    """Return what the figures of a sweep are about, in one line."""
    tuned = f"tuned for {numbers.counted(sweep.tuned, 'epoch')}" if sweep.tuned else "not tuned"
    spread = "mean and standard deviation over the seeds" if len(sweep.seeds) > 1 else ""
    images = measured_on(sweep.data, sweep.split, sweep.base.images, sweep.seeds)
    return "; ".join(filter(None, (images, spread, tuned)))


def sweep_charts(sweep: Sweep) -> list[Chart]:
    """Return accuracy against the budget and the cost, a line for each variant; none without accuracies."""
    base = sweep.base.accuracy
    if base is None or all(summary.accuracy is None for summary in sweep.summaries):
        return []
    unpruned = ReferenceLine(f"unpruned {numbers.percent(base)}", 100 * base)
    return [
        Chart(f"Accuracy against {axis.label}", axis, Axis("accuracy", "%"), _curves(sweep, axis), (unpruned,))
        for axis in _AGAINST[sweep.axis]
    ]


def _curves(sweep: Sweep, against: Axis) -> tuple[Series, ...]:
    """Return the points of each variant by cost, beginning at the unpruned network."""
    base = sweep.base
    first = {_RATIO: 0.0, _MACS: float(base.macs or 0), _PARAMS: float(base.params)}[against]
    start = Point(first, 100 * (base.accuracy or 0.0), note=f"unpruned: {numbers.percent(base.accuracy)}", fixed=True)
    curves: dict[str, list[Point]] = {}
    for summary in sweep.summaries:
        if summary.accuracy is not None:
            curves.setdefault(summary.label, []).append(_place(summary, summary.accuracy, against))
    return tuple(
        Series(label, (start, *sorted(places, key=lambda p: abs(p.x - first))), "line")
        for label, places in curves.items()
    )


def _place(summary: Summary, accuracy: float, against: Axis) -> Point:
    x = {_RATIO: summary.budget, _MACS: summary.macs, _PARAMS: summary.params}[against]
    figures = f"{numbers.percent_about(accuracy, summary.deviation)}, {numbers.count(summary.macs)} MACs"
    note = f"{summary.label}, {written(summary.budget)}: {figures}"
    return Point(float(x or 0), 100 * accuracy, note=note, spread=100 * (summary.deviation or 0.0))
