"""The passes of prune and tune, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.terminal.output import Output
from prunekit.report.terminal.tables import table
from prunekit.report.terminal.tuning import say_kept, warn_of_loss

if TYPE_CHECKING:
    from prunekit.workflows.passes import PassResult


def say_pass(output: Output, done: PassResult, images: int) -> None:
    """Write at the end of a pass what it came to on `images` test images."""
    output.note(
        f"pass {done.number}: {numbers.percent(done.accuracy_pruned)} after pruning, "
        f"{numbers.percent(done.accuracy_tuned)} after tuning, {done.after.macs:,} MACs"
    )
    say_kept(output, done.kept)
    warn_of_loss(output, done.accuracy_pruned, done.accuracy_tuned, images)


def report_passes(output: Output, passes: Sequence[PassResult], start: float) -> None:
    """Show all passes in one table."""
    first = passes[0].before
    rows = [("before", "", numbers.percent(start), f"{first.params:,}", f"{first.macs:,}")]
    rows += [
        (
            f"pass {done.number}",
            numbers.percent(done.accuracy_pruned),
            numbers.percent(done.accuracy_tuned),
            f"{done.after.params:,}",
            f"{done.after.macs:,}",
        )
        for done in passes
    ]
    output.table(table(["", "after pruning", "after tuning", "parameters", "MACs"], rows), data=False)
