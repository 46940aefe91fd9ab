"""A sweep as a page, and the charts of a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.pages import page
from prunekit.report.pictures import svg
from prunekit.report.pictures.chart import Axis, Chart, Point, ReferenceLine, Series, drawn, score_axis
from prunekit.report.provenance import measured_on
from prunekit.report.terminal.sweeping import failures, recommended, sweep_cells
from prunekit.workflows.sweeps.points import written

if TYPE_CHECKING:
    from prunekit.workflows.sweeps.summary import Summary, Sweep

_RATIO = Axis("ratio", "share of channels removed")
_MACS = Axis("MACs", "for one image", written=numbers.count)
_PARAMS = Axis("parameters", written=numbers.count)
# What the score is drawn against, by the axis of the sweep.
_AGAINST = {
    "ratio": (_RATIO, _MACS),
    "target_macs": (_MACS,),
    "target_params": (_PARAMS, _MACS),
    "target_latency": (_MACS,),
}


def sweep_page(title: str, sweep: Sweep) -> str:
    """Return one page: the curves, what is recommended, and every figure."""
    charts = sweep_charts(sweep)
    pictures = [page.charts([svg.draw(chart) for chart in charts]), svg.legend(charts[0].series)] if charts else []
    words = [page.paragraph(line) for line in (recommended(sweep), *failures(sweep))]
    parts = [*pictures, *words, page.heading("Figures"), page.table(*sweep_cells(sweep))]
    return page.page(title, parts, about=sweep_about(sweep))


def sweep_about(sweep: Sweep) -> str:
    """Return what the figures of a sweep are about, in one line."""
    tuned = f"tuned for {numbers.counted(sweep.tuned, 'epoch')}" if sweep.tuned else "not tuned"
    spread = "mean and standard deviation over the seeds" if len(sweep.seeds) > 1 else ""
    images = measured_on(sweep.data, sweep.split, sweep.base.images, sweep.seeds)
    return "; ".join(filter(None, (images, spread, tuned)))


def sweep_charts(sweep: Sweep) -> list[Chart]:
    """Return the score against the budget and the cost, a line for each variant; none without scores."""
    base, metric = sweep.base.score, sweep.metric
    if base is None or all(summary.score is None for summary in sweep.summaries):
        return []
    unpruned = ReferenceLine(f"unpruned {numbers.score(metric, base)}", drawn(metric, base))
    return [
        Chart(f"{metric.title} against {axis.label}", axis, score_axis(metric), _curves(sweep, axis), (unpruned,))
        for axis in _AGAINST[sweep.axis]
    ]


def _curves(sweep: Sweep, against: Axis) -> tuple[Series, ...]:
    """Return the points of each variant by cost, beginning at the unpruned network."""
    base, metric = sweep.base, sweep.metric
    first = {_RATIO: 0.0, _MACS: float(base.macs or 0), _PARAMS: float(base.params)}[against]
    start = Point(
        first, drawn(metric, base.score or 0.0), note=f"unpruned: {numbers.score(metric, base.score)}", fixed=True
    )
    curves: dict[str, list[Point]] = {}
    for summary in sweep.summaries:
        if summary.score is not None:
            curves.setdefault(summary.label, []).append(_place(summary, summary.score, against))
    return tuple(
        Series(label, (start, *sorted(places, key=lambda p: abs(p.x - first))), "line")
        for label, places in curves.items()
    )


def _place(summary: Summary, score: float, against: Axis) -> Point:
    metric = summary.metric
    x = {_RATIO: summary.budget, _MACS: summary.macs, _PARAMS: summary.params}[against]
    figures = f"{numbers.score(metric, score, summary.deviation)}, {numbers.count(summary.macs)} MACs"
    note = f"{summary.label}, {written(summary.budget)}: {figures}"
    return Point(float(x or 0), drawn(metric, score), note=note, spread=drawn(metric, summary.deviation or 0.0))
