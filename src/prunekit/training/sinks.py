"""Destinations of events besides a terminal: `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from prunekit.errors import InputError
from prunekit.training.events import EpochEvent, Event, SaveEvent, StartEvent, StepEvent

_KINDS = {StartEvent: "start", StepEvent: "step", EpochEvent: "epoch", SaveEvent: "save"}


class MetricsFile:
    """File of metrics that grows by one line of JSON per event, `{"event": "step", …}`.

    A resumed run first drops the lines that it will write again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, event: Event) -> None:
        line = json.dumps({"event": _KINDS[type(event)], **dataclasses.asdict(event)}) + "\n"
        try:
            if isinstance(event, StartEvent):
                self.path.write_text("".join(self._before(event)), encoding="utf-8")
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}") from error

    def _before(self, start: StartEvent) -> list[str]:
        if start.step == 0 or not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start.step]


class TensorBoard:
    """TensorBoard writer for the figures of each step and epoch, as scalars in a folder."""

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("TensorBoard is not installed", hint="pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        if not isinstance(event, StepEvent | EpochEvent):
            return
        kind = _KINDS[type(event)]
        values = dataclasses.asdict(event)
        for name, value in {**values, **values.pop("figures")}.items():
            if name not in ("epoch", "epochs", "step", "steps", "figures", "metric") and value is not None:
                self._writer.add_scalar(f"{kind}/{name}", value, event.step)

    def close(self) -> None:
        """Write what is still buffered."""
        self._writer.close()
