"""Tables for people. Their text may change at any time: programs read the JSON documents."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.table import Table

from prunekit.report import numbers
from prunekit.report.text import for_csv, for_markdown, printable

if TYPE_CHECKING:
    from prunekit.evaluation.score import EvalResult


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, left: int = 1) -> Table:
    """Return a table with `left` columns of text, then columns of figures.

    Names (the first column) and figures are never wrapped; other text may be.
    """
    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    columns, cells = [*map(printable, columns)], [tuple(map(printable, row)) for row in rows]
    for index, column in enumerate(columns):
        wraps = 0 < index < left
        width = 20 if wraps else max(len(text) for text in (column, *(row[index] for row in cells)))
        side: Literal["left", "right"] = "left" if index < left else "right"
        grid.add_column(column, justify=side, overflow="fold", no_wrap=not wraps, min_width=width)
    for row in cells:
        grid.add_row(*row)
    return grid


def results_table(results: Sequence[EvalResult], *, columns: Sequence[str] | None = None) -> Table:
    """Return networks side by side as a table; see `result_cells`."""
    return table(*result_cells(results, columns=columns))


def result_cells(
    results: Sequence[EvalResult], *, columns: Sequence[str] | None = None
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return columns and rows of the table of `results`, as text, with the relative change from the first network.

    A column without any figure is left out, as is any column not in `columns`.
    """
    first = results[0]
    cells: dict[str, list[str]] = {
        "model": [r.model for r in results],
        "accuracy": [numbers.percent(r.accuracy) for r in results],
        "balanced": [numbers.percent(r.balanced_accuracy) if _unbalanced(r) else numbers.NONE for r in results],
        "top-5": [numbers.percent(r.accuracy_top5) for r in results],
        "loss": [numbers.NONE if r.loss is None else f"{r.loss:.4f}" for r in results],
        "parameters": [against(first.params, r.params, f"{r.params:,}") for r in results],
        "MACs": [against(first.macs, r.macs, numbers.count(r.macs)) for r in results],
        "size": [numbers.data_size(r.bytes) for r in results],
        "latency": [numbers.milliseconds(r.latency_ms.p50 if r.latency_ms else None) for r in results],
        "p95": [numbers.milliseconds(r.latency_ms.p95 if r.latency_ms else None) for r in results],
    }
    shown = [name for name in columns or cells if any(cell != numbers.NONE for cell in cells[name])]
    return shown, list(zip(*(cells[name] for name in shown), strict=True))


def _unbalanced(result: EvalResult) -> bool:
    """Return whether the mean over the classes says more than plain accuracy."""
    return result.answers is not None and result.answers.unbalanced


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Return the same table in Markdown."""
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    lines = [columns, rule, *rows]
    return "\n".join("| " + " | ".join(map(for_markdown, line)) + " |" for line in lines)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return comma-separated values, quoted where necessary; empty cells for missing figures, and no formulas."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(for_csv, columns))
    writer.writerows(map(for_csv, row) for row in rows)
    return text.getvalue()


def flat(result: EvalResult) -> dict[str, object]:
    """Return a result's figures without rounding, one per column: `latency_ms` becomes `latency_ms_p50` and so on."""
    plain = result.to_json()
    latency = plain.pop("latency_ms") or {}
    plain.pop("gates", None)  # a document of its own
    names = ("p50", "p95", "batch", "threads", "device", "calls")
    return {**plain, **{f"latency_ms_{name}": latency.get(name) for name in names}}


def against(first: int, value: int, text: str) -> str:
    """Return the figure, with its change against the first network's where they differ."""
    return f"{text} {numbers.change(first, value)}" if value != first else text
