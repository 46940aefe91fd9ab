"""Progress of long work: a bar with the time left on a terminal, an occasional plain line off it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from prunekit.report.terminal.output import Output

Count = Callable[[int, int], None]
"""Takes what is done and what there is in all, in any unit."""

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def counting(output: Output, label: str) -> Iterator[Count]:
    """Show the progress of one piece of work, called `label`; yield the function that receives it."""
    if output.live:
        with bar(output) as progress:
            task = progress.add_task(printable(label), total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
    else:
        yield _Lines(output, label)


def bar(output: Output) -> Progress:
    """Return a progress bar on standard error that disappears when the work is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=output.people(),
        transient=True,
    )


class _Lines:
    """Progress as a line every few seconds: off a terminal a bar would fill a log."""

    def __init__(self, output: Output, label: str) -> None:
        self.output = output
        self.label = label
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_LINES or not done:
            return
        self.last = now
        left = (now - self.start) * (total - done) / done
        self.output.note(f"{self.label}: {done} of {total}, {numbers.duration(left)} left")
