"""Progress of long work: a bar with the time left on a terminal, an occasional plain line off it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BEFORE_ESTIMATES = 1.0
_SECONDS_BETWEEN_UPDATES = 0.05
_SECONDS_UNSEEN = 0.5  # a bar for shorter work would only flicker


class Bar:
    """A line on a terminal that shows the present piece of work and vanishes when it is hidden."""

    def __init__(self, console: Callable[[], Console]) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._work: tuple[str, int] | None = None
        self._updated = 0.0

    def __call__(self, what: str, done: int, total: int, *, key: str | None = None) -> None:
        """Show how far a piece of work is; a `total` of 0 stands for one that nobody knows.

        Args:
            what: The work.
            done: How much of it is done.
            total: How much there is in all.
            key: What tells it from other work, where `what` changes while it goes on.
        """
        now, work = time.monotonic(), (key or what, total)
        same = self._progress is not None and work == self._work
        if same and now - self._updated < _SECONDS_BETWEEN_UPDATES and done != total:
            return
        self._updated, self._work = now, work
        if self._progress is None:
            self._progress = _progress(self._console())
            self._progress.start()
        elif not same:
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
        if not self._progress.task_ids:
            self._progress.add_task(printable(what), total=total or None, completed=done)
        self._progress.update(self._progress.task_ids[0], description=printable(what), completed=done)

    def hide(self) -> None:
        """Take the line away; the next piece of work shows one again."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Lines:
    """A line every few seconds: off a terminal a bar would fill a log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._what: str | None = None
        self._start, self._first = 0.0, 0
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say how far a piece of work is, with the time left, unless that was just done."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._start, self._first = what, now, done
        if now - self._last < SECONDS_BETWEEN_LINES or now - self._start < SECONDS_BEFORE_ESTIMATES:
            return
        if done <= self._first:
            return
        self._last = now
        left = (now - self._start) * (total - done) / (done - self._first)
        self._say(f"{what}: {done:,} of {total:,}, {numbers.duration(left)} left" if total else f"{what}: {done:,}")


def _progress(console: Console) -> Progress:
    """Return a bar that disappears when the work is done."""
    from collections.abc import Iterable

    from rich.console import RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    began = time.monotonic()

    class Delayed(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            if time.monotonic() - began >= _SECONDS_UNSEEN:
                yield from super().get_renderables()

    return Delayed(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )
