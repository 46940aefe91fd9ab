"""The passes of prune and tune, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit.metric import ACCURACY
from prunekit.report import numbers
from prunekit.report.terminal.output import Output
from prunekit.report.terminal.tables import table
from prunekit.report.terminal.tuning import say_kept, warn_of_loss

if TYPE_CHECKING:
    from prunekit.workflows.passes import PassResult


def say_pass(output: Output, done: PassResult, images: int) -> None:
    """Write at the end of a pass what it came to on `images` test examples."""
    output.note(
        f"pass {done.number}: {_named(done)}{numbers.score(done.metric, done.score_pruned)} after pruning, "
        f"{numbers.score(done.metric, done.score_tuned)} after tuning, {done.after.macs:,} MACs"
    )
    say_kept(output, done.kept)
    warn_of_loss(output, done.metric, done.score_pruned, done.score_tuned, images)


def _named(done: PassResult) -> str:
    """Return what goes before a score that is no accuracy."""
    return "" if done.metric == ACCURACY else f"{done.metric.name} "


def report_passes(output: Output, passes: Sequence[PassResult], start: float) -> None:
    """Show all passes in one table."""
    first = passes[0].before
    rows = [("before", "", numbers.score(passes[0].metric, start), f"{first.params:,}", f"{first.macs:,}")]
    rows += [
        (
            f"pass {done.number}",
            numbers.score(done.metric, done.score_pruned),
            numbers.score(done.metric, done.score_tuned),
            f"{done.after.params:,}",
            f"{done.after.macs:,}",
        )
        for done in passes
    ]
    output.table(table(["", "after pruning", "after tuning", "parameters", "MACs"], rows), data=False)
