"""Charts as SVG, drawn by hand so that a page needs nothing else; colours are those of `page`'s style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 480, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 36, 52
_COLOURS = 6
_RADIUS = 9  # of a marker with a text in it


@dataclass(frozen=True)
class Point:
    """One figure: where it stands, what is written in its marker, and what hovering over it tells."""

    x: float
    y: float
    mark: str = ""
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line if `joined`."""

    name: str
    points: tuple[Point, ...]
    joined: bool = False


@dataclass(frozen=True)
class Axis:
    """What an axis shows, and how a figure on it is written."""

    label: str
    written: Callable[[float], str]


class _Scale:
    """From figures to places on paper: round ticks, and a little room at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        self.low, self.high = low - room, high + room
        if low >= 0:
            self.low = max(self.low, 0.0)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, about: int = 5) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten."""
        raw = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = min((power * m for m in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / raw)))
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Points and lines over two axes, as one `<svg>`; empty where there are no points."""
    points = [point for line in series for point in line.points]
    if not points:
        return ""
    across = _Scale([p.x for p in points], _LEFT, _WIDTH - _RIGHT)
    up = _Scale([p.y for p in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>', *_axes(across, up, x, y)]
    taken: list[tuple[float, float]] = []
    for number, line in enumerate(series):
        parts += _line(line, number % _COLOURS, across, up, taken)
    label = escape(f"{title}: {y.label} against {x.label}", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def legend(series: Sequence[Series]) -> str:
    """Which colour is whose."""
    keys = "".join(f'<span class="key f{i % _COLOURS}"></span>{escape(line.name)}' for i, line in enumerate(series))
    return f"<p>{keys}</p>"


def _axes(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in up.ticks():
        place = up(value)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place + 4}" text-anchor="end">{escape(y.written(value))}</text>')
    for value in across.ticks():
        place = across(value)
        parts.append(f'<line class="axis" x1="{place}" x2="{place}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{place}" y="{bottom + 20}" text-anchor="middle">{escape(x.written(value))}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    return parts


def _line(line: Series, colour: int, across: _Scale, up: _Scale, taken: list[tuple[float, float]]) -> list[str]:
    places = [(across(p.x), up(p.y), p) for p in line.points]
    parts = []
    if line.joined and len(places) > 1:
        path = " ".join(f"{x},{y}" for x, y, _ in places)
        parts.append(f'<polyline class="l{colour}" stroke-width="2" points="{path}"/>')
    for x, y, point in places:
        drawn = _marked(x, y, point.mark, colour, taken) if point.mark else _dot(x, y, colour, 4)
        parts.append(f"<g><title>{escape(point.note or line.name)}</title>{drawn}</g>")
    return parts


def _dot(x: float, y: float, colour: int, radius: int) -> str:
    return f'<circle class="f{colour}" cx="{x}" cy="{y}" r="{radius}"/>'


def _marked(x: float, y: float, mark: str, colour: int, taken: list[tuple[float, float]]) -> str:
    """A marker with its text, moved aside where one stands already, and tied to its true place."""
    place = x
    step = 2 * _RADIUS if x < _WIDTH / 2 else -2 * _RADIUS
    while any(math.hypot(place - other, y - height) < 2 * _RADIUS - 1 for other, height in taken):
        place += step
    taken.append((place, y))
    tie = f'<line class="l{colour}" stroke-width="2" x1="{x}" x2="{place}" y1="{y}" y2="{y}"/>' if place != x else ""
    text = f'<text class="mark" x="{place}" y="{y + 4}" text-anchor="middle">{escape(mark)}</text>'
    return f"{tie}{_dot(place, y, colour, _RADIUS)}{text}"
