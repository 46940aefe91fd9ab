"""A training run as people watch it: a bar and a line per epoch on a terminal, plain lines off it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.terminal.progress import bar
from prunekit.training.events import EpochEvent, Event, Sink, StartEvent, StepEvent

if TYPE_CHECKING:
    from rich.progress import Progress

    from prunekit.report.terminal.output import Output

_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def watching(output: Output, label: str = "training") -> Iterator[Sink]:
    """Show a run; yield the sink that receives its events."""
    if output.live:
        with bar(output) as progress:
            yield _Watcher(output, label, progress)
    else:
        yield _Watcher(output, label, None)


class _Watcher:
    """Turns events into lines, and on a terminal into a bar with the lines above it."""

    def __init__(self, output: Output, label: str, progress: Progress | None) -> None:
        self.output = output
        self.label = label
        self.progress = progress
        self.task = progress.add_task(label, total=None) if progress else None
        self.last = time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StartEvent):
            self._started(event)
        elif isinstance(event, EpochEvent):
            self._say(_epoch(event))
            self.last = time.monotonic()
        elif isinstance(event, StepEvent):
            self._stepped(event)
        else:
            self.output.record(f"saved {event.path} at step {event.step}")

    def _started(self, event: StartEvent) -> None:
        where = event.device + (f", {event.processes} processes" if event.processes > 1 else "")
        begun = f", going on at step {event.step}" if event.step else ""
        penalty = f", {event.penalised} gammas penalised" if event.penalised else ""
        self._say(
            f"{self.label}: {numbers.counted(event.images, 'image')}, {numbers.counted(event.epochs, 'epoch')} of "
            f"{numbers.counted(event.steps // event.epochs, 'step')} with {numbers.counted(event.batch, 'image')}, "
            f"learning rate {event.lr:.2g}, on {where}{penalty}{begun}"
        )

    def _stepped(self, event: StepEvent) -> None:
        line = (
            f"step {event.step}/{event.steps}  {_figures(event)}  "
            f"{event.images_per_second:.0f} images/s, {numbers.duration(event.eta)} left"
        )
        if self.progress is None and time.monotonic() - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self._say(line)
        else:
            self.output.record(line)
        if self.progress is not None and self.task is not None:
            self.progress.update(
                self.task,
                completed=event.step,
                total=event.steps,
                description=f"epoch {event.epoch}/{event.epochs} {_figures(event)}",
            )

    def _say(self, line: str) -> None:
        self.output.note(line, console=self.progress.console if self.progress is not None else None)


def _epoch(event: EpochEvent) -> str:
    parts = [f"epoch {event.epoch}/{event.epochs}", _figures(event)]
    if event.val_accuracy is not None:
        parts.append(f"validation {numbers.percent(event.val_accuracy)}")
    if event.sparsity is not None:
        parts.append(f"sparse {numbers.percent(event.sparsity, decimals=1)}")
    return "  ".join([*parts, numbers.duration(event.seconds)])


def _figures(event: StepEvent | EpochEvent) -> str:
    others = [f"{name.replace('_', ' ')} {numbers.percent(value, decimals=1)}" for name, value in event.figures.items()]
    return "  ".join([f"loss {event.loss:.4f}", f"accuracy {numbers.percent(event.accuracy)}", *others])
