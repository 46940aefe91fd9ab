"""What people should know of a tuning: which images decide, whether it is long enough, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunekit.metric import Metric
from prunekit.report import numbers
from prunekit.report.text import printable

if TYPE_CHECKING:
    from prunekit.data import Examples
    from prunekit.report.terminal.output import Output


def say_validation(output: Output, val: Examples) -> None:
    """Which images "validation" are."""
    from prunekit.data import ImageSet

    where = printable(val.name)
    if val.held_out and not isinstance(val, ImageSet):
        what = "every tenth of those for training, left out here (the network may know them from before)"
    elif val.held_out:
        what = (
            f"every tenth of each class for training in {where}, left out here (the network may know them from before)"
        )
    else:
        what = f"those that {where} sets apart for it"
    output.note(f"validation: {numbers.counted(len(val), val.noun)}, {what}")


def warn_of_few_steps(output: Output, images: int, batch: int, fewest: int) -> None:
    """A warning where an epoch on so many images has fewer than `fewest` steps."""
    steps = max(1, images // batch)
    if steps < fewest:
        output.warn(
            f"an epoch has only {numbers.counted(steps, 'step')} ({numbers.counted(images, 'image')} in batches of "
            f"{batch}), which teaches little: lower --batch-size, or add images or --epochs"
        )


def say_kept(output: Output, kept: Mapping[str, Any] | None) -> None:
    """Which weights the network has now; a warning where all of the tuning was in vain."""
    if kept is None:
        return
    metric = Metric.from_json(kept["metric"])
    start = numbers.score(metric, kept["start"])
    if kept["epoch"]:
        where = f"epoch {kept['epoch']} of {kept['epochs']}"
        output.note(
            f"kept: {where}, best in validation with {numbers.score(metric, kept['score'])} (before tuning {start})"
        )
    else:
        output.warn(
            f"tuning did not make the network better, so it is kept as it was before, with {start} in validation: "
            "try more --epochs, another --lr or more images"
        )


def warn_of_loss(output: Output, metric: Metric, before: float, after: float, images: int) -> None:
    """A warning where the score on the test examples got worse, a share by more than chance explains: two standard
    errors.
    """
    chance = 2 * (before * (1 - before) / images) ** 0.5 if metric.is_share and 0 <= before <= 1 else 0.0
    if metric.lost(before, after) > chance:
        output.warn(
            f"the tuned network has {numbers.score(metric, after)} on the test images, "
            f"{numbers.score(metric, before)} before "
            "tuning: try another --lr, more --epochs, or --keep best"
        )
