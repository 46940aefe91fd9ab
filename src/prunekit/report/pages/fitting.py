"""A search for the smallest network that meets a goal, as a page, and the chart of a picture."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from prunekit.evaluation.drops import left_after
from prunekit.metric import ACCURACY
from prunekit.report import numbers
from prunekit.report.pages import page
from prunekit.report.pictures import svg
from prunekit.report.pictures.chart import Axis, Chart, Point, ReferenceLine, Series
from prunekit.report.terminal.fitting import doubts, fit_cells, in_words
from prunekit.workflows.fitting.trials import frontier

if TYPE_CHECKING:
    from prunekit.workflows.fitting.outcome import Outcome
    from prunekit.workflows.fitting.trials import Trial

CHOSEN = "chosen"


def fit_page(title: str, found: Outcome) -> str:
    """Return one page: the result, the score against MACs, and every trial."""
    fitted, chart = found.fitted, fit_chart(found)
    cards = page.cards(
        [
            (f"lost, of {found.held_out.report.noun}s that did not decide", numbers.percent(found.drop.share)),
            (f"at most, with {fitted.goal.confidence:.0%} confidence", numbers.percent(found.bound)),
            ("MACs", f"{numbers.count(found.after.macs)} {numbers.change(fitted.before.macs, found.after.macs or 0)}"),
            ("parameters", f"{found.after.params:,} {numbers.change(fitted.before.params, found.after.params)}"),
        ]
    )
    words = [page.paragraph(line) for line in (in_words(found), *doubts(found))]
    drawn = [page.charts([svg.draw(chart)]), svg.legend(chart.series)]
    parts = [cards, *drawn, *words, page.heading("What was tried"), page.table(*fit_cells(found), left=2)]
    return page.page(title, parts, about=fit_about(found))


def fit_about(found: Outcome) -> str:
    """Return what the figures are about, in one line."""
    metric = found.before.metric or ACCURACY
    way = "down to what the {} is at least" if metric.higher_is_better else "as far as what the {} is at most"
    sure = f"bars reach {way.format(metric.name)}, with {found.fitted.goal.confidence:.0%} confidence"
    return f"{found.data}: {found.held_out.said}; {sure}"


def fit_chart(found: Outcome) -> Chart:
    """Return the score, on the images that decide, against MACs: each way, the frontier, the goal, what was chosen."""
    fitted = found.fitted
    metric, score, goal = fitted.original.metric or ACCURACY, fitted.original.score or 0.0, fitted.goal.drop
    unit = 100 if metric.is_share else 1
    whole = Point(fitted.before.macs, unit * score, note=f"original: {numbers.score(metric, score)}", fixed=True)

    def place(trial: Trial) -> Point:
        assert trial.cost is not None
        assert trial.drop is not None
        left, least = (left_after(metric, score, share) for share in (trial.drop.share, trial.bound or 0.0))
        note = f"{trial.label}: {numbers.score(metric, left)}, {numbers.count(trial.cost.macs)} MACs"
        spread, down = unit * abs(left - least), metric.higher_is_better
        return Point(trial.cost.macs, unit * left, note=note, spread=spread, one_sided=down, fixed=True)

    scored = [trial for trial in fitted.history if trial.drop is not None]
    ways = dict.fromkeys(_way(trial) for trial in scored)
    edge = (*(dataclasses.replace(place(trial), spread=0.0) for trial in frontier(scored)), whole)
    series = [Series("frontier", edge, "line", muted=True)]
    series += [Series(way, tuple(place(trial) for trial in scored if _way(trial) == way)) for way in ways]
    series.append(Series(CHOSEN, (place(fitted.trial),)))
    floor = ReferenceLine(f"at most {numbers.counted_points(100 * goal)} lost", unit * left_after(metric, score, goal))
    axes = Axis("MACs", "for one image", written=numbers.count), Axis(metric.name, metric.unit)
    return Chart(f"{metric.title} against MACs", *axes, tuple(series), (floor,))


def _way(trial: Trial) -> str:
    return f"{trial.way}, tuned" if trial.epochs else trial.way
