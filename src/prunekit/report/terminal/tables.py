"""Tables for people. Their text may change at any time: programs read the JSON documents."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.cells import cell_len
from rich.measure import Measurement
from rich.table import Table

from prunekit.metric import ACCURACY
from prunekit.report import numbers
from prunekit.report.text import for_csv, for_markdown, printable

RUNTIMES = {"pytorch": "PyTorch", "pt2": "PyTorch, .pt2", "onnxruntime": "ONNX Runtime", "masked": "PyTorch, masked"}
"""Names for people of the runtimes that networks were measured in; others keep theirs."""
_NOTICED = 1.05  # ratio of latencies that people would ask about

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from prunekit.evaluation.score import EvalResult


# Least width of a column of text, and of a first column that has to wrap.
_TEXT = 20
_NAME = 8


@dataclass(frozen=True)
class FigureTable:
    """A table that fits: where it is wider than the terminal, its columns stand in several tables under each other.

    Each of these begins with the first column, which wraps only where it leaves a figure no room. A figure is never cut
    or wrapped.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None
    left: int

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return the width of the whole, in one table."""
        return Measurement.get(console, options, self._part(range(len(self.columns))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the whole, or the tables that it takes."""
        del console
        for number, part in enumerate(self._parts(options.max_width)):
            yield self._part(part, title=None if number else self.title, width=options.max_width)

    def _parts(self, width: int) -> list[list[int]]:
        """Return the columns of each table."""
        parts = [[0]]
        for index in range(1, len(self.columns)):
            longer = [*parts[-1], index]
            if len(parts[-1]) == 1 or self._room(longer, width) >= self._width(0):
                parts[-1] = longer
            else:
                parts.append([0, index])
        return parts

    def _room(self, part: Sequence[int], width: int) -> int:
        """Return what the others leave for the first column: three spaces stand between two, one at each end."""
        return width - sum(self._width(index) + 3 for index in part[1:]) - 2

    def _part(self, part: Sequence[int], *, title: str | None = None, width: int | None = None) -> Table:
        grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
        room = max(_NAME, self._room(part, width)) if width is not None and len(part) > 1 else self._width(0)
        for index in part:
            name_wraps = index == 0 and room < self._width(0)
            side: Literal["left", "right"] = "left" if index < self.left else "right"
            grid.add_column(
                self.columns[index],
                justify=side,
                overflow="fold",
                no_wrap=not (name_wraps or self._wraps(index)),
                min_width=room if name_wraps else self._width(index),
                max_width=room if name_wraps else None,
            )
        for row in self.rows:
            grid.add_row(*(row[index] for index in part))
        return grid

    def _wraps(self, index: int) -> bool:
        return 0 < index < self.left

    def _width(self, index: int) -> int:
        longest = max(cell_len(text) for text in (self.columns[index], *(row[index] for row in self.rows)))
        return min(longest, _TEXT) if self._wraps(index) else longest


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, left: int = 1
) -> FigureTable:
    """Return a table with `left` columns of text, then columns of figures."""
    cells = [tuple(map(printable, row)) for row in rows]
    return FigureTable([*map(printable, columns)], cells, title, left)


def results_table(results: Sequence[EvalResult], *, columns: Sequence[str] | None = None) -> FigureTable:
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
        "runtime": _where_they_differ([RUNTIMES.get(r.runtime, r.runtime) for r in results]),
        "budget": [(r.gates or {}).get("budget") or numbers.NONE for r in results],
        **_score_cells(results),
        "balanced": [numbers.percent(r.balanced_accuracy) if _unbalanced(r) else numbers.NONE for r in results],
        "top-5": [numbers.percent(r.accuracy_top5) for r in results],
        "loss": [numbers.NONE if r.loss is None else f"{r.loss:.4f}" for r in results],
        "parameters": [against(first.params, r.params, f"{r.params:,}") for r in results],
        "MACs": [against(first.macs, r.macs, numbers.count(r.macs)) for r in results],
        "size": [numbers.data_size(r.bytes) for r in results],
        "latency": [_latency(r) for r in results],
        "p95": [numbers.milliseconds(r.latency_ms.p95 if r.latency_ms else None) for r in results],
    }
    shown = [name for name in columns or cells if any(cell != numbers.NONE for cell in cells[name])]
    return shown, list(zip(*(cells[name] for name in shown), strict=True))


def _score_cells(results: Sequence[EvalResult]) -> dict[str, list[str]]:
    """Return a column for the score that counts, and for others than a task's loss; of classification, accuracy."""
    metric = next((r.metric for r in results if r.metric is not None), ACCURACY)
    cells = {metric.name: [numbers.score(metric, r.score) for r in results]}
    if metric != ACCURACY:
        others = dict.fromkeys(name for r in results for name in r.scores if name not in (metric.name, "loss"))
        for name in others:
            cells[name] = [f"{r.scores[name]:.4g}" if name in r.scores else numbers.NONE for r in results]
    return cells


def _latency(result: EvalResult) -> str:
    timing = result.latency_ms
    return numbers.NONE if timing is None else numbers.spread(timing.p50, timing.spread)


def latency_note(results: Sequence[EvalResult]) -> str | None:
    """Return what to make of latencies that differ although the networks are equally large; None where none do."""
    alike: dict[tuple[object, ...], list[EvalResult]] = {}
    for result in results:
        if result.latency_ms is not None and result.macs is not None:
            timing = result.latency_ms
            key = (result.params, result.macs, result.runtime, timing.batch, timing.device)
            alike.setdefault(key, []).append(result)
    for group in alike.values():
        times = {r.model: r.latency_ms.p50 for r in group if r.latency_ms is not None}
        if max(times.values()) > _NOTICED * min(times.values()):
            found = ", ".join(f"{name} {numbers.milliseconds(time)}" for name, time in times.items())
            return f"as large as each other, but not as fast ({found}): that is most likely noise of the machine"
    return None


def _where_they_differ(cells: list[str]) -> list[str]:
    """Return the cells; none of them where all are the same."""
    return cells if len(set(cells)) > 1 else [numbers.NONE] * len(cells)


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
    gates = plain.pop("gates", None) or {}  # a document of its own, but for the budget
    metric = plain.pop("metric") or {}
    del plain["scores"]
    plain["score_name"] = metric.get("name")
    names = ("p50", "p95", "batch", "threads", "device", "calls", "p25", "p75")
    return {**plain, **{f"latency_ms_{name}": latency.get(name) for name in names}, "budget": gates.get("budget")}


def against(first: int | None, value: int | None, text: str) -> str:
    """Return the figure, with its change against the first network's where that is known and above a half percent."""
    if not first or value is None:
        return text
    change = numbers.change(first, value)
    return text if change[1:] == "0 %" else f"{text} {change}"
