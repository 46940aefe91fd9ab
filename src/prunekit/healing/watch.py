"""When healing ends: by the clock, or once it brings nothing better."""

from __future__ import annotations

import math
import time

from prunekit.progress import counter
from prunekit.training.events import EpochEvent, Event, Sink, StepEvent

_PATIENCE = 0.4  # of the epochs may bring nothing better on the held-out images
_LEAST_PATIENCE = 5  # epochs


class Watch:
    """Counts the steps of a run, hands its events on, and says when it is enough.

    Attributes:
        began: Whether a step was made.
        stopped: Why the run ends before all epochs are done; None while it does not.
    """

    def __init__(self, deadline: float, epochs: int, sink: Sink | None) -> None:
        self.began = False
        self.stopped: str | None = None
        self._deadline, self._sink = deadline, sink
        self._patience = max(_LEAST_PATIENCE, math.ceil(_PATIENCE * epochs))
        self._count = counter("healing")
        self._best, self._since = -math.inf, 0

    def __call__(self, event: Event) -> bool:
        """Take an event in, and return whether the run is to end."""
        if self._sink is not None:
            self._sink(event)
        if isinstance(event, StepEvent):
            self.began = True
            self._count(event.step, event.steps)
            if time.perf_counter() > self._deadline:
                self.stopped = self.stopped or f"the time was over in epoch {event.epoch} of {event.epochs}"
        elif isinstance(event, EpochEvent):
            self._judge(event)
        return self.stopped is not None

    def _judge(self, event: EpochEvent) -> None:
        """Note whether an epoch has brought anything; ties in agreement go by the loss."""
        score = (event.val_accuracy or 0.0) - 1e-3 * (event.val_loss or 0.0)
        self._since = 0 if score > self._best else self._since + 1
        self._best = max(self._best, score)
        if self._since >= self._patience and event.epoch < event.epochs:
            self.stopped = f"{self._since} epochs in a row brought nothing better"
