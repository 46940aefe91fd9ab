"""Tables for people. Their text may change at any time: programs read the JSON documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.table import Table

from prunekit.report import numbers

if TYPE_CHECKING:
    from prunekit.evaluation import EvalResult


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are figures.

    Names (the first column) and figures are never wrapped; the text between them may be.
    """
    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    cells = [tuple(row) for row in rows]
    for index, column in enumerate(columns):
        wraps = 0 < index < left
        width = 20 if wraps else max(len(text) for text in (column, *(row[index] for row in cells)))
        side: Literal["left", "right"] = "left" if index < left else "right"
        grid.add_column(column, justify=side, overflow="fold", no_wrap=not wraps, min_width=width)
    for row in cells:
        grid.add_row(*row)
    return grid


def results_table(results: Sequence[EvalResult], *, columns: Sequence[str] | None = None) -> Table:
    """Networks side by side; a column that none of them has a figure for is left out, as what `columns` omits."""
    first = results[0]
    cells: dict[str, list[str]] = {
        "model": [r.model for r in results],
        "accuracy": [numbers.percent(r.accuracy) for r in results],
        "top-5": [numbers.percent(r.accuracy_top5) for r in results],
        "loss": [numbers.NONE if r.loss is None else f"{r.loss:.4f}" for r in results],
        "parameters": [_against(first.params, r.params, f"{r.params:,}") for r in results],
        "MACs": [_against(first.macs, r.macs, numbers.count(r.macs)) for r in results],
        "size": [numbers.data_size(r.bytes) for r in results],
        "latency": [numbers.milliseconds(r.latency_ms.p50 if r.latency_ms else None) for r in results],
        "p95": [numbers.milliseconds(r.latency_ms.p95 if r.latency_ms else None) for r in results],
    }
    shown = [name for name in columns or cells if any(cell != numbers.NONE for cell in cells[name])]
    return table(shown, zip(*(cells[name] for name in shown), strict=True))


def _against(first: int, value: int, text: str) -> str:
    """The figure, and its change against the first network's where it differs."""
    return f"{text} {numbers.change(first, value)}" if value != first else text
