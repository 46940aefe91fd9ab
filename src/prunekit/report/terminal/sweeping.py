"""A sweep as a table, and its recommendation in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.terminal import tables
from prunekit.workflows.sweeps.points import written

if TYPE_CHECKING:
    from prunekit.evaluation.score import EvalResult
    from prunekit.report.terminal.output import Output
    from prunekit.workflows.sweeps.summary import Summary, Sweep

BUDGETS = {
    "ratio": "ratio",
    "target_macs": "target MACs",
    "target_params": "target parameters",
    "target_latency": "target latency",
}
"""The heading of the budgets along each axis."""

_MACS, _PARAMS = "MACs", "parameters"


def show_sweep(output: Output, sweep: Sweep, format: str) -> None:
    """Write the sweep to standard output, the unpruned network first; below it what is recommended, for people."""
    if format == "csv":
        output.data(_csv(sweep))
    elif format == "markdown":
        output.data(tables.markdown(*sweep_cells(sweep)))
    else:
        output.table(tables.table(*sweep_cells(sweep)), data=True)
    for line in (*failures(sweep), recommended(sweep)):
        output.note(line)


def sweep_cells(sweep: Sweep) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the columns and rows of the table: a row for each variant and budget, the mean of its seeds.

    A column without any figure is left out.
    """
    cells = [_unpruned(sweep.base), *(_row(sweep, summary) for summary in sweep.summaries)]
    columns = ["method", BUDGETS[sweep.axis], "seeds", sweep.metric.name, _PARAMS, _MACS, "size", "latency"]
    shown = [i for i in range(len(columns)) if any(row[i] not in (numbers.NONE, "") for row in cells)]
    return [columns[i] for i in shown], [tuple(row[i] for i in shown) for row in cells]


def _unpruned(base: EvalResult) -> tuple[str, ...]:
    latency = base.latency_ms.p50 if base.latency_ms else None
    figures = (f"{base.params:,}", numbers.count(base.macs), numbers.data_size(base.bytes))
    return ("unpruned", "", "", numbers.score(base.metric, base.score), *figures, numbers.milliseconds(latency))


def _row(sweep: Sweep, summary: Summary) -> tuple[str, ...]:
    done, asked, base = len(summary.results), len(summary.points), sweep.base
    seeds = "" if len(sweep.seeds) < 2 else str(done) if done == asked else f"{done} of {asked}"
    start = (summary.label, written(summary.budget), seeds)
    if summary.params is None or summary.macs is None:
        return (*start, "failed", *(numbers.NONE,) * 4)
    size = summary.mean(lambda result: result.bytes)
    return (
        *start,
        numbers.score(summary.metric, summary.score, summary.deviation),
        tables.against(base.params, summary.params, f"{summary.params:,}"),
        tables.against(base.macs, summary.macs, numbers.count(summary.macs)),
        numbers.data_size(None if size is None else round(size)),
        numbers.milliseconds(summary.mean(lambda result: result.latency_ms.p50 if result.latency_ms else None)),
    )


def _csv(sweep: Sweep) -> str:
    """Return a line for each point, without rounding."""
    flat = tables.flat(sweep.base)
    rows = [["", None, None, *flat.values(), None]]
    for point in sweep.points:
        figures = tables.flat(point.result).values() if point.result else [None] * len(flat)
        rows.append([point.label, point.budget[1], point.seed, *figures, point.error])
    return tables.csv_text(["method", sweep.axis, "seed", *flat, "error"], rows)


def failures(sweep: Sweep) -> list[str]:
    """Return a line for each variant and budget that has no figures with some seed, with the reason."""
    return [
        f"{summary.label} {written(summary.budget)} failed: {'; '.join(summary.errors)}"
        for summary in sweep.summaries
        if summary.errors
    ]


def recommended(sweep: Sweep) -> str:
    """Return the recommendation in one sentence."""
    found, base = sweep.recommendation, sweep.base
    if found is None:
        return "no recommendation: that takes scores"
    size = _PARAMS if found.by == "params" else _MACS
    within = numbers.counted_points(found.within) if sweep.metric.is_share else f"{found.within:g} %"
    points = f"{within} of the original's {numbers.score(base.metric, base.score)}"
    if found.best is not None:
        chosen = " (chosen by the test images; --split val chooses by others)" if sweep.split == "test" else ""
        return f"recommended: {_named(sweep, found.best)}, of the fewest {size} within {points}{chosen}"
    line = f"nothing smaller comes within {points}"
    if found.nearest is None or base.score is None or found.nearest.score is None:
        return line
    lost = numbers.score_lost(sweep.metric, base.score, found.nearest.score)
    return f"{line}; the nearest is {_named(sweep, found.nearest)}, {lost} worse: prune less, or tune for more --epochs"


def _named(sweep: Sweep, summary: Summary) -> str:
    """Return a network with its score and its size."""
    score = numbers.score(summary.metric, summary.score, summary.deviation)
    macs, params = summary.macs or 0, summary.params or 0
    by_params = sweep.axis == "target_params"
    base, value = (sweep.base.params, params) if by_params else (sweep.base.macs or 0, macs)
    size = f"{numbers.count(value)} {_PARAMS if by_params else _MACS}"
    name = f"{summary.label} at {BUDGETS[sweep.axis]} {written(summary.budget)}"
    return f"{name}, {score} with {size} ({numbers.change(base, value)})"
