"""A search for the smallest network that meets a goal: a line for each trial, one table, and the result in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.terminal import tables
from prunekit.workflows.fitting.trials import frontier

if TYPE_CHECKING:
    from prunekit.report.terminal.output import Output
    from prunekit.workflows.fitting.outcome import Outcome
    from prunekit.workflows.fitting.trials import Trial


def say_trial(output: Output, trial: Trial) -> None:
    """Write what became of a trial in one line."""
    if trial.drop is None or trial.cost is None:
        output.note(f"{trial.label}: {trial.error}")
        return
    verdict = "meets the goal" if trial.met else "loses too much"
    output.note(
        f"{trial.label}: {_lost(trial.drop.share)} (at most {_points(trial.bound)}), {verdict}; "
        f"{numbers.count(trial.cost.macs)} MACs, {numbers.duration(trial.seconds)}"
    )


def show_fit(output: Output, found: Outcome) -> None:
    """Write the table of all trials, then what the chosen network comes to, for people."""
    output.table(tables.table(*fit_cells(found), left=2), data=False)
    output.note(in_words(found))
    for line in doubts(found):
        output.warn(line)


def fit_cells(found: Outcome) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the columns and rows of the table: the original first, then each trial, from many MACs to few."""
    fitted, best = found.fitted, frontier(found.fitted.history)
    columns = ["network", "", "drop", "at most", "MACs", "parameters", "time"]
    before = fitted.before
    rows: list[tuple[str, ...]] = [("original", "", "", "", numbers.count(before.macs), f"{before.params:,}", "")]
    for trial in sorted(fitted.history, key=lambda trial: -trial.share):
        mark = "chosen" if trial == fitted.trial else "meets the goal" if trial.met else ""
        mark = mark or ("failed" if trial.cost is None else "on the frontier" if trial in best else "")
        macs = tables.against(before.macs, trial.cost.macs, numbers.count(trial.cost.macs)) if trial.cost else ""
        params = tables.against(before.params, trial.cost.params, f"{trial.cost.params:,}") if trial.cost else ""
        drop = _points(trial.drop.share if trial.drop else None)
        rows.append((trial.label, mark, drop, _points(trial.bound), macs, params, numbers.duration(trial.seconds)))
    return columns, rows


def in_words(found: Outcome) -> str:
    """Return what the chosen network has lost on images that did not decide, and its size, in one sentence."""
    fitted, drop, after = found.fitted, found.drop, found.after
    metric, noun = found.before.metric, found.held_out.report.noun
    return (
        f"{fitted.trial.label}: {_lost(drop.share)} of {numbers.counted(drop.images, noun)} that did not decide "
        f"(at most {_points(found.bound)} with {fitted.goal.confidence:.0%} confidence), from "
        f"{numbers.score(metric, found.before.score)} to {numbers.score(metric, after.score)}; "
        f"{numbers.count(after.macs)} MACs ({numbers.change(fitted.before.macs, after.macs or 0)}), "
        f"{after.params:,} parameters ({numbers.change(fitted.before.params, after.params)})"
    )


def doubts(found: Outcome) -> list[str]:
    """Return a line where the images that did not decide say otherwise than those that did."""
    if found.drop.share <= found.fitted.goal.drop:
        return []
    return [
        f"that is more than the {found.fitted.goal.drop:.2%} that were allowed, which happens by chance: name more "
        "images, or ask for more --confidence"
    ]


def _lost(share: float) -> str:
    return f"gains {_points(-share)}" if share < 0 else f"loses {_points(share)}"


def _points(share: float | None) -> str:
    return numbers.percent(share).replace("-", "−")
