"""Charts as SVG, written by hand so that a page needs nothing else; colours are those of `page`'s style."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from prunekit.report.pictures.chart import SHAPES, Axis, Chart, Point, ReferenceLine, Series, apart, ticks
from prunekit.report.text import for_html

_WIDTH, _HEIGHT = 480, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 88, 28, 36, 56
_COLOURS = 6
_RADIUS = 9  # of a marker with text in it
_LETTER = 8.6  # approximate width of a letter, in the size of the labels
_LINE = 18  # of text
_MANY = 100  # points, above which markers are small
# Corners of the shapes after the circle, in radii: a square, a triangle and a diamond.
_CORNERS = (
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
)


@dataclass(frozen=True)
class _Box:
    """The paper that a text takes: its ends across, and its baseline."""

    left: float
    right: float
    base: float

    def meets(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and abs(self.base - other.base) < _LINE


class _Scale:
    """Mapping from figures to pixels, with a margin at both ends."""

    def __init__(self, extent: tuple[float, float], axis: Axis, start: float, end: float) -> None:
        low, high = extent
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        self.low, self.high = low - room, high + room
        if low >= 0:
            self.low = max(self.low, 0.0)
        self.start, self.end = (end, start) if axis.descending else (start, end)
        self.axis = axis

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def across(self) -> list[tuple[float, str]]:
        """Return positions and texts below the plot: none crosses its edge or overlaps another."""

        def fits(found: Sequence[tuple[float, str]]) -> bool:
            ends = sorted((self(value) - _wide(text) / 2, self(value) + _wide(text) / 2) for value, text in found)
            apart = all(right + _LETTER < left for (_, right), (left, _) in pairwise(ends))
            return apart and all(left >= 0 and right <= _WIDTH for left, right in ends)

        return [(self(value), text) for value, text in ticks(self.low, self.high, self.axis, fits)]

    def up(self) -> list[tuple[float, str]]:
        """Return positions and texts beside the plot."""

        def fits(found: Sequence[tuple[float, str]]) -> bool:
            return all(_wide(text) <= _LEFT - 24 for _, text in found)

        return [(self(value), text) for value, text in ticks(self.low, self.high, self.axis, fits)]


def draw(chart: Chart) -> str:
    """Return the chart as one `<svg>`; empty where there are no points."""
    if not chart.points:
        return ""
    chart = apart(chart)
    across = _Scale(chart.extent("x"), chart.x, _LEFT, _WIDTH - _RIGHT)
    up = _Scale(chart.extent("y"), chart.y, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<text class="title" x="{_LEFT}" y="18">{for_html(chart.title)}</text>', *_axes(across, up)]
    taken: list[tuple[float, float]] = []
    for series, look in zip(chart.series, _looks(chart.series), strict=True):
        parts += _series(series, look, across, up, taken)
    labels = [_Box(x - _RADIUS, x + _RADIUS, y + 5) for x, y in taken]
    level_first = sorted(chart.references, key=lambda line: line.along, reverse=True)
    parts += [_reference(line, across, up, labels) for line in level_first]
    label = for_html(chart.description)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def legend(series: Sequence[Series]) -> str:
    """Return the legend: the marker and name of each series."""
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 14 14" aria-hidden="true">{_shaped(7, 7, look, 5)}</svg>'
        f"{for_html(line.name)}</span> "
        for line, look in zip(series, _looks(series), strict=True)
    )
    return f'<p class="keys">{keys}</p>'


@dataclass(frozen=True)
class _Look:
    """The colour of a series by its name in the style (`b` for muted series), and the shape of its markers."""

    colour: str
    shape: int = 0


def _looks(series: Sequence[Series]) -> list[_Look]:
    bright = itertools.count()
    looks = []
    for line in series:
        number = 0 if line.muted else next(bright)
        looks.append(_Look("b") if line.muted else _Look(str(number % _COLOURS), number % SHAPES))
    return looks


def _axes(across: _Scale, up: _Scale) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for place, text in up.up():
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{round(place + 5, 1)}" text-anchor="end">{for_html(text)}</text>')
    for place, text in across.across():
        parts.append(f'<line class="axis" x1="{place}" x2="{place}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{place}" y="{bottom + 20}" text-anchor="middle">{for_html(text)}</text>')
    middle, height = (_LEFT + right) / 2, (_TOP + bottom) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{for_html(across.axis.title)}</text>')
    turned = f'transform="translate(16 {height}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{for_html(up.axis.title)}</text>')
    return parts


def _reference(line: ReferenceLine, across: _Scale, up: _Scale, labels: list[_Box]) -> str:
    """Return a dashed line and its label, at an end of the line where there is room.

    The label is clear of markers and of earlier labels, which `labels` has, and is added to them.
    """
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    if line.along == "y":
        place = up(line.value)
        ends = f'x1="{_LEFT}" x2="{right}" y1="{place}" y2="{place}"'
        sides, heights = {"end": float(right), "start": float(_LEFT)}, (place - 9, place + 18)
    else:
        place = across(line.value)
        ends = f'x1="{place}" x2="{place}" y1="{_TOP}" y2="{bottom}"'
        sides = {"start": place + 6} if place < (_LEFT + right) / 2 else {"end": place - 6}
        heights = (_TOP + 12, bottom - 8)
    found = [(side, _label(line.label, x, height, side)) for side, x in sides.items() for height in heights]
    side, label = next((one for one in found if not any(one[1].meets(other) for other in labels)), found[0])
    labels.append(label)
    text = f'x="{round(sides[side], 1)}" y="{round(label.base, 1)}" text-anchor="{side}"'
    return f'<line class="reference" {ends}/><text class="over" {text}>{for_html(line.label)}</text>'


def _label(text: str, x: float, base: float, side: str) -> _Box:
    """Return the paper of a text that starts or ends at `x`."""
    left = x if side == "start" else x - _wide(text)
    return _Box(left, left + _wide(text), base)


def _series(series: Series, look: _Look, across: _Scale, up: _Scale, taken: list[tuple[float, float]]) -> list[str]:
    colour = look.colour
    if series.form == "bars":
        return [_bar(point, series, colour, across, up) for point in series.points]
    if series.form == "steps":
        half = series.step / 2
        corners = [(across(p.x + side * half), up(p.y)) for p in series.points for side in (-1, 1)]
        return [_polyline(corners, colour)]
    places = [(across(p.x), up(p.y), p) for p in series.points]
    parts = [_polyline([(x, y) for x, y, _ in places], colour)] if series.form == "line" and len(places) > 1 else []
    radius = 4 if len(places) < _MANY else 2
    for x, y, point in places:
        if point.mark:
            drawn = _marked(x, y, point.mark, colour, taken)
        else:
            drawn = _shaped(x, y, look, radius)
            taken.append((x, y))
        bar = _spreads(x, y, point, colour, across, up)
        parts.append(f"<g><title>{for_html(point.note or series.name)}</title>{bar}{drawn}</g>")
    return parts


def _spreads(x: float, y: float, point: Point, colour: str, across: _Scale, up: _Scale) -> str:
    """Return the error bars of a point at `x` and `y`, with caps; empty where it has none."""
    path = ""
    if point.spread:
        top, bottom = up(point.y + point.spread_up), up(point.y - point.spread)
        caps = "".join(f"M{round(x - 4, 1)} {end}H{round(x + 4, 1)}" for end in (top, bottom) if end != y)
        path += f"M{x} {top}V{bottom}{caps}"
    if point.spread_x:
        left, right = across(point.x - point.spread_x), across(point.x + point.spread_x)
        caps = "".join(f"M{end} {round(y - 4, 1)}V{round(y + 4, 1)}" for end in (left, right))
        path += f"M{left} {y}H{right}{caps}"
    return f'<path class="l{colour}" stroke-width="1.5" d="{path}"/>' if path else ""


def _polyline(places: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x},{y}" for x, y in places)
    return f'<polyline class="l{colour}" stroke-width="2" points="{path}"/>'


def _bar(point: Point, series: Series, colour: str, across: _Scale, up: _Scale) -> str:
    half = series.step * series.width / 2
    left, right = sorted((across(point.x - half), across(point.x + half)))
    top, wide = up(point.y), round(max(1.0, right - left - 1), 1)
    shape = f'x="{left}" y="{top}" width="{wide}" height="{round(up(0.0) - top, 1)}"'
    return f'<rect class="f{colour}" {shape}><title>{for_html(point.note or series.name)}</title></rect>'


def _dot(x: float, y: float, colour: str, radius: int) -> str:
    return f'<circle class="f{colour}" cx="{x}" cy="{y}" r="{radius}"/>'


def _shaped(x: float, y: float, look: _Look, radius: int) -> str:
    """Return a marker: a circle, a square, a triangle or a diamond, by the look of its series."""
    if not look.shape:
        return _dot(x, y, look.colour, radius)
    corners = _CORNERS[look.shape - 1]
    places = " ".join(f"{round(x + radius * a, 1)},{round(y + radius * b, 1)}" for a, b in corners)
    return f'<polygon class="f{look.colour}" points="{places}"/>'


def _marked(x: float, y: float, mark: str, colour: str, taken: list[tuple[float, float]]) -> str:
    """Return a marker with its text, moved aside where another stands, and tied to its true position."""
    place = x
    step = 2 * _RADIUS if x < _WIDTH / 2 else -2 * _RADIUS
    while any(math.hypot(place - other, y - height) < 2 * _RADIUS - 1 for other, height in taken):
        place += step
    taken.append((place, y))
    tie = f'<line class="l{colour}" stroke-width="2" x1="{x}" x2="{place}" y1="{y}" y2="{y}"/>' if place != x else ""
    text = f'<text class="mark" x="{place}" y="{y + 4}" text-anchor="middle">{for_html(mark)}</text>'
    return f"{tie}{_dot(place, y, colour, _RADIUS)}{text}"


def _wide(text: str) -> float:
    return _LETTER * len(text)
