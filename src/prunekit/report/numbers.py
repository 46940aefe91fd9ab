"""Formatting of figures. Metric prefixes are powers of a thousand, for bytes as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.errors import counted as counted

if TYPE_CHECKING:
    from prunekit.metric import Metric

NONE = "–"


def count(value: float | None) -> str:
    """Format a count with three figures: 853018 as 853 K."""
    if value is None:
        return NONE
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.{_decimals(value / size)}f} {prefix}"
    return f"{value:g}"


def data_size(value: int | None) -> str:
    """Format a number of bytes: 3450000 as 3.45 MB."""
    return NONE if value is None else count(value) + ("B" if value >= 1000 else " B")


def percent(value: float | None, *, decimals: int = 2) -> str:
    """Format a share as a percentage: 0.9388 as 93.88 %."""
    return NONE if value is None else f"{100 * value:.{decimals}f} %"


def score(metric: Metric | None, value: float | None, deviation: float | None = None) -> str:
    """Format a score in its unit, with its deviation where there is one: 93.88 %, 0.0312 px, 1.52 ± 0.03."""
    if value is None or metric is None:
        return NONE
    if metric.is_share:
        return percent_about(value, deviation)
    about = "" if deviation is None else f" ± {deviation:.2g}"
    return f"{value:.4g}{about} {metric.unit}".strip()


def score_lost(metric: Metric, before: float, after: float) -> str:
    """Format by how much a score has become worse: 2.35 points, 0.02 px."""
    lost = metric.lost(before, after)
    return counted_points(100 * lost) if metric.is_share else score(metric, lost)


def percent_about(mean: float | None, deviation: float | None) -> str:
    """Format a share and its deviation, where there is one: 0.9388 and 0.002 as 93.88 ± 0.20 %."""
    if mean is None or deviation is None:
        return percent(mean)
    return f"{100 * mean:.2f} ± {100 * deviation:.2f} %"


def counted_points(value: float) -> str:
    """Format a difference of percentages: 1 point, 2.35 points."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return f"{text} point" if text == "1" else f"{text} points"


def change(before: float, after: float) -> str:
    """Format a relative change: from 200 to 100 as −50 %."""
    if not before:
        return NONE
    share = after / before - 1
    return f"{'−' if share < 0 else '+'}{100 * abs(share):.0f} %"


def milliseconds(value: float | None) -> str:
    """Format milliseconds with three figures: 2.3456 as 2.35 ms."""
    return NONE if value is None else f"{value:.{_decimals(value)}f} ms"


def spread(value: float | None, half: float | None) -> str:
    """Format milliseconds with half the distance of their quartiles, where that shows: 2.35 ms ± 0.08."""
    if value is None or half is None or not round(half, _decimals(value)):
        return milliseconds(value)
    return f"{milliseconds(value)} ± {half:.{_decimals(value)}f}"


def duration(seconds: float) -> str:
    """Format seconds: 75.2 as 1 m 15 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"


def _decimals(value: float) -> int:
    """Return the decimals that make three figures: 1.23, 12.3, 123."""
    return 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
