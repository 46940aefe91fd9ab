"""A training run as people watch it: a bar and a line per epoch on a terminal, plain lines off it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prunekit.metric import ACCURACY
from prunekit.report import numbers
from prunekit.training.events import EpochEvent, Event, Sink, StartEvent, StepEvent

if TYPE_CHECKING:
    from prunekit.report.terminal.output import Output

_SECONDS_BETWEEN_LINES = 30.0


def watching(output: Output, label: str = "training") -> Sink:
    """Return the sink that shows the events of a run."""
    return _Watcher(output, label)


class _Watcher:
    """Turns events into lines, and on a terminal into a bar with the lines above it."""

    def __init__(self, output: Output, label: str) -> None:
        self.output = output
        self.label = label
        self.last = time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StartEvent):
            self._started(event)
        elif isinstance(event, EpochEvent):
            self.output.note(_epoch(event))
            self.last = time.monotonic()
        elif isinstance(event, StepEvent):
            self._stepped(event)
        else:
            self.output.record(f"saved {event.path} at step {event.step}")

    def _started(self, event: StartEvent) -> None:
        where = event.device + (f", {event.processes} processes" if event.processes > 1 else "")
        begun = f", going on at step {event.step}" if event.step else ""
        penalty = f", {event.penalised} gammas penalised" if event.penalised else ""
        self.output.note(
            f"{self.label}: {numbers.counted(event.images, event.noun)}, {numbers.counted(event.epochs, 'epoch')} of "
            f"{numbers.counted(event.steps // event.epochs, 'step')} with {numbers.counted(event.batch, event.noun)}, "
            f"learning rate {event.lr:.2g}, on {where}{penalty}{begun}"
        )

    def _stepped(self, event: StepEvent) -> None:
        line = (
            f"step {event.step}/{event.steps}  {_figures(event)}  "
            f"{event.images_per_second:.0f} images/s, {numbers.duration(event.eta)} left"
        )
        if self.output.live:
            what = f"epoch {event.epoch}/{event.epochs} {_figures(event)}"
            self.output.progress(what, event.step, event.steps, key=self.label)
        elif time.monotonic() - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self.output.note(line)
            return
        self.output.record(line)


def _epoch(event: EpochEvent) -> str:
    parts = [f"epoch {event.epoch}/{event.epochs}", _figures(event)]
    if event.val_score is not None:
        named = "" if event.metric == ACCURACY else f"{event.metric.name} "
        parts.append(f"validation {named}{numbers.score(event.metric, event.val_score)}")
    if event.sparsity is not None:
        parts.append(f"sparse {numbers.percent(event.sparsity, decimals=1)}")
    return "  ".join([*parts, numbers.duration(event.seconds)])


def _figures(event: StepEvent | EpochEvent) -> str:
    others = [f"{name.replace('_', ' ')} {numbers.percent(value, decimals=1)}" for name, value in event.figures.items()]
    accuracy = [] if event.accuracy is None else [f"accuracy {numbers.percent(event.accuracy)}"]
    return "  ".join([f"loss {event.loss:.4f}", *accuracy, *others])
