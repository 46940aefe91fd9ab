"""Events that a training run reports. Only the first of several processes reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StartEvent:
    """A run begins or resumes at `epoch` and `step`, both 0 for a new run."""

    epoch: int
    epochs: int
    step: int
    steps: int
    device: str
    processes: int
    images: int
    penalised: int


@dataclass(frozen=True)
class StepEvent:
    """Progress of a run: `loss` and `accuracy` (0 to 1) over this epoch's training images so far.

    `epoch` counts from 1, `step` from the beginning of the run. `sparsity` is the share of batch-norm gammas of at most
    1 % of the largest (None without batch norm). `eta` is in seconds. `figures` are further ones of the training
    method, by name.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    lr: float
    sparsity: float | None
    images_per_second: float
    eta: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EpochEvent:
    """End of an epoch; the validation figures are None where there is no validation set."""

    epoch: int
    epochs: int
    step: int
    loss: float
    accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    lr: float
    sparsity: float | None
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveEvent:
    """The state was written to `path`."""

    path: str
    epoch: int
    step: int


Event = StartEvent | StepEvent | EpochEvent | SaveEvent
Sink = Callable[[Event], object]
