"""Description of a chart, independent of the renderer: `svg` for pages, `png` (Matplotlib) for files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from prunekit.metric import Metric

Form = Literal["points", "line", "bars", "steps"]

SHAPES = 4
"""Shapes of markers: series of one colour differ in shape, and colour is not all that tells series apart."""

_NEAR = 0.025  # of an axis: closer points hide each other
_STEP = 0.015  # of an axis: what lines are moved by


def plainly(value: float) -> str:
    """Format a figure without superfluous digits."""
    return f"{value:g}"


@dataclass(frozen=True)
class Axis:
    """An axis: its label, its unit, and the format of its figures (without the unit).

    With `names`, the positions 0, 1, 2, … have these names. `descending` puts the largest figure first.
    """

    label: str
    unit: str = ""
    written: Callable[[float], str] = plainly
    names: tuple[str, ...] = ()
    descending: bool = False

    @property
    def title(self) -> str:
        """Label and unit, as drawn."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


def score_axis(metric: Metric) -> Axis:
    """Return the axis of a score."""
    return Axis(metric.name, metric.unit)


def drawn(metric: Metric, value: float) -> float:
    """Return where a score stands on its axis, a share in percent; likewise a difference of scores."""
    return 100 * value if metric.is_share else value


@dataclass(frozen=True)
class Point:
    """One point: its coordinates, the text in its marker or beside it, and its tooltip.

    `spread` is the reach of its error bar up and down, down alone where it is `one_sided`; `spread_x` that of one
    across. A `fixed` point stays where it is when lines are drawn apart.
    """

    x: float
    y: float
    mark: str = ""
    name: str = ""
    note: str = ""
    spread: float = 0.0
    spread_x: float = 0.0
    one_sided: bool = False
    fixed: bool = False

    @property
    def spread_up(self) -> float:
        """The reach of the error bar upwards."""
        return 0.0 if self.one_sided else self.spread


@dataclass(frozen=True)
class Series:
    """Points of one colour: alone, joined by a line, or as the heights of bars or steps around `x`.

    Bars take the share `width` of the distance to their neighbours; `muted` series are the ones to compare with.
    """

    name: str
    points: tuple[Point, ...]
    form: Form = "points"
    width: float = 1.0
    muted: bool = False

    @property
    def solid(self) -> bool:
        """True for bars and steps, whose heights begin at zero."""
        return self.form in ("bars", "steps")

    @property
    def step(self) -> float:
        """The least distance between neighbours."""
        places = sorted({point.x for point in self.points})
        return min((b - a for a, b in pairwise(places)), default=1.0)


@dataclass(frozen=True)
class ReferenceLine:
    """A line across the chart at `value` of the axis `along`, with a label."""

    label: str
    value: float
    along: Literal["x", "y"] = "y"


@dataclass(frozen=True)
class Chart:
    """Series over two axes, with reference lines."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    references: tuple[ReferenceLine, ...] = field(default=())

    @property
    def points(self) -> tuple[Point, ...]:
        """The points of all series."""
        return tuple(point for series in self.series for point in series.points)

    @property
    def description(self) -> str:
        """Description of the chart in one line, for screen readers."""
        return f"{self.title}: {self.y.title} against {self.x.title}"

    def extent(self, along: Literal["x", "y"]) -> tuple[float, float]:
        """Return the least and the largest figure that one axis must cover."""
        if along == "y":
            found = [end for point in self.points for end in (point.y - point.spread, point.y + point.spread_up)]
        else:
            found = [point.x + side * point.spread_x for point in self.points for side in (-1, 1)]
        found += [reference.value for reference in self.references if reference.along == along]
        for series in self.series:
            if series.solid and series.points:
                half = series.step * series.width / 2
                reach = [point.x + side * half for point in series.points for side in (-1, 1)]
                found += reach if along == "x" else [0.0]
        return min(found), max(found)


def apart(chart: Chart) -> Chart:
    """Return the chart with lines that would hide each other side by side.

    A series moves right by one step for each earlier one that has a point in nearly the same place; points that are
    `fixed` stay. Notes have the true figures.
    """
    wide, high = (max(ends) - min(ends) or 1.0 for ends in (chart.extent("x"), chart.extent("y")))
    moved: list[Series] = []
    for number, series in enumerate(chart.series):
        before = [one for one in chart.series[:number] if one.form == series.form == "line"]
        step = _STEP * wide * sum(_meet(one, series, wide, high) for one in before)
        points = tuple(p if p.fixed else replace(p, x=p.x + step) for p in series.points)
        moved.append(replace(series, points=points))
    return replace(chart, series=tuple(moved))


def _meet(one: Series, other: Series, wide: float, high: float) -> bool:
    """Return whether two series have a point in nearly the same place, those that are fixed apart."""
    return any(
        abs(a.x - b.x) < _NEAR * wide and abs(a.y - b.y) < _NEAR * high
        for a in one.points
        for b in other.points
        if not (a.fixed and b.fixed)
    )


def ticks(
    low: float, high: float, axis: Axis, fits: Callable[[Sequence[tuple[float, str]]], bool]
) -> list[tuple[float, str]]:
    """Return round figures between `low` and `high` with their texts: as many, up to six, as `fits` allows."""
    found: list[tuple[float, str]] = []
    for about in (6, 5, 4, 3, 2, 1):
        found = _named(low, high, axis.names, about) if axis.names else _round(low, high, axis, about)
        if len({text for _, text in found}) == len(found) and fits(found):
            return found
    return found[:1]


def _round(low: float, high: float, axis: Axis, about: int) -> list[tuple[float, str]]:
    """Return multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / raw)))
    first = math.ceil(low / step)
    return [(i * step, axis.written(i * step)) for i in range(first, math.floor(high / step) + 1)]


def _named(low: float, high: float, names: Sequence[str], about: int) -> list[tuple[float, str]]:
    every = max(1, math.ceil(len(names) / about))
    return [(float(i), name) for i, name in enumerate(names) if i % every == 0 and low <= i <= high]
