"""Points of all seeds in one, and the network to recommend."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunekit.evaluation.score import EvalResult
from prunekit.metric import ACCURACY, Metric
from prunekit.workflows.sweeps.points import SweepPoint, written

_ABOUT = 1.05  # sizes up to this multiple of the smallest count as equal


@dataclass(frozen=True)
class Summary:
    """The points of one variant and one budget, one for each seed.

    Means are over the seeds that came to a result; None where none did.
    """

    points: tuple[SweepPoint, ...]

    @property
    def label(self) -> str:
        """The variant."""
        return self.points[0].label

    @property
    def budget(self) -> float | str:
        """How far along the axis."""
        return self.points[0].budget[1]

    @property
    def results(self) -> list[EvalResult]:
        """The measurements that there are."""
        return [point.result for point in self.points if point.result is not None]

    @property
    def errors(self) -> list[str]:
        """Why there are no others."""
        return list(dict.fromkeys(point.error for point in self.points if point.error is not None))

    @property
    def scores(self) -> list[float]:
        """The score of each seed."""
        return [result.score for result in self.results if result.score is not None]

    @property
    def metric(self) -> Metric:
        """What is scored."""
        return next((result.metric for result in self.results if result.metric is not None), ACCURACY)

    @property
    def score(self) -> float | None:
        """The mean score."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation of the scores (with n - 1); None for fewer than two seeds."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def mean(self, figure: Callable[[EvalResult], float | None]) -> float | None:
        """Return the mean of a figure of the measurements."""
        found = [value for result in self.results if (value := figure(result)) is not None]
        return statistics.fmean(found) if found else None

    @property
    def macs(self) -> int | None:
        """The mean MACs of an image, rounded."""
        return _rounded(self.mean(lambda result: result.macs))

    @property
    def params(self) -> int | None:
        """The mean parameters, rounded."""
        return _rounded(self.mean(lambda result: result.params))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "label": self.label,
            "budget": written(self.budget),
            "seeds": [point.seed for point in self.points if point.result is not None],
            "failed": [point.seed for point in self.points if point.result is None],
            "accuracy": self.score if self.metric == ACCURACY else None,
            "score": self.score,
            "deviation": self.deviation,
            "params": self.params,
            "macs": self.macs,
        }


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def summarise(points: Sequence[SweepPoint]) -> list[Summary]:
    """Return a summary for each variant and budget: variants in the order of their first points, budgets likewise,
    but ratios from small to large.
    """
    labels = list(dict.fromkeys(point.label for point in points))
    budgets = list(dict.fromkeys(point.budget[1] for point in points))
    if all(isinstance(budget, int | float) for budget in budgets):
        budgets.sort()
    found: dict[tuple[str, str], list[SweepPoint]] = {}
    for point in sorted(points, key=lambda point: point.seed):
        found.setdefault(point.key[:2], []).append(point)
    wanted = [(label, written(budget)) for label in labels for budget in budgets]
    return [Summary(tuple(found[key])) for key in wanted if key in found]


@dataclass(frozen=True)
class Recommendation:
    """The smallest network whose score is within a number of points of the original's, on average over the seeds; of
    those that are about as small, the best.

    Attributes:
        within: How much may be lost: points of a share (hundredths of it), or percent of any other score.
        by: What small means: `macs`, or `params` where the budgets are parameters.
        best: The network; None where there is none.
        nearest: The best one where there is none; None without any.
    """

    within: float
    by: str
    best: Summary | None
    nearest: Summary | None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        chosen = {name: getattr(self, name) for name in ("best", "nearest")}
        found = {name: summary.to_json() if summary else None for name, summary in chosen.items()}
        return {"within": self.within, "by": self.by, **found}


def recommend(base: EvalResult, summaries: Sequence[Summary], axis: str, within: float) -> Recommendation | None:
    """Return the smallest network whose score is at most `within` points worse than that of `base`; None without one.

    Of a score that is no share, a point is a hundredth of that of `base`. The network has to be smaller than `base`.
    Methods meet a budget more or less exactly, so that sizes up to 5 % above the smallest count as equal, and the score
    decides among them.
    """
    by = "params" if axis == "target_params" else "macs"
    scored = [summary for summary in summaries if summary.score is not None]
    if base.score is None or base.metric is None or not scored:
        return None
    metric, start, size = base.metric, base.score, getattr(base, by)
    most = within / 100 * (1.0 if metric.is_share else abs(start))

    def goodness(summary: Summary) -> float:
        return metric.goodness(summary.score or 0.0)

    near = [s for s in scored if metric.goodness(start) - goodness(s) <= most + 1e-9 and getattr(s, by) < size]
    smallest = min((getattr(s, by) for s in near), default=0)
    equal = [s for s in near if getattr(s, by) <= _ABOUT * smallest]
    best = max(equal, key=lambda s: (goodness(s), -getattr(s, by)), default=None)
    nearest = None if best else max(scored, key=goodness)
    return Recommendation(within, by, best, nearest)


@dataclass(frozen=True)
class Sweep:
    """A whole sweep, as tables, pictures and pages show it.

    Attributes:
        base: The measurements of the network that was swept.
        points: All points.
        axis: What the budgets are, one of `AXES`.
        data: The images it was measured on, as named; None for none.
        split: Which of them.
        tuned: The epochs of tuning after each pruning; 0 for none.
        within: How many points of the score a recommended network may lose.
    """

    base: EvalResult
    points: tuple[SweepPoint, ...]
    axis: str
    data: str | None
    split: str
    tuned: int = 0
    within: float = 1.0

    @property
    def metric(self) -> Metric:
        """What networks are scored by."""
        return self.base.metric or ACCURACY

    @cached_property
    def summaries(self) -> list[Summary]:
        """The points of all seeds in one, by variant and budget."""
        return summarise(self.points)

    @cached_property
    def recommendation(self) -> Recommendation | None:
        """The network to recommend; None without scores."""
        return recommend(self.base, self.summaries, self.axis, self.within)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the points."""
        return sorted({point.seed for point in self.points})

    @property
    def failed(self) -> list[SweepPoint]:
        """The points without figures."""
        return [point for point in self.points if point.result is None]
