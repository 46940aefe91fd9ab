"""Events that a training run reports. Only the first of several processes reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StartEvent:
    """A run begins or resumes at `epoch` and `step`, both 0 for a new run.

    `batch` images make a step, and `lr` is the learning rate at its peak.

    Examples:
        >>> import prunekit as pk
        >>> digits, told = pk.open_data("digits", "train").sample(256), []
        >>> model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
        >>> config = pk.TrainConfig(epochs=1, batch_size=128, device="cpu")
        >>> _ = pk.train(model, config, digits, state_path="run.state", on_event=told.append)
        >>> [(e.epochs, e.steps, e.images) for e in told if isinstance(e, pk.StartEvent)]
        [(1, 2, 256)]
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    device: str
    processes: int
    images: int
    penalised: int
    batch: int = 0
    lr: float = 0.0


@dataclass(frozen=True)
class StepEvent:
    """Progress of a run: `loss` and `accuracy` (0 to 1) over this epoch's training images so far.

    `epoch` counts from 1, `step` from the beginning of the run. `sparsity` is the share of batch-norm gammas of at most
    1 % of the largest (None without batch norm). `eta` is in seconds. `figures` are further ones of the training
    method, by name.

    Examples:
        >>> import prunekit as pk
        >>> digits, told = pk.open_data("digits", "train").sample(256), []
        >>> model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
        >>> config = pk.TrainConfig(epochs=1, batch_size=128, log_every=1, device="cpu")
        >>> _ = pk.train(model, config, digits, state_path="run.state", on_event=told.append)
        >>> [e.step for e in told if isinstance(e, pk.StepEvent)]
        [1, 2]
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
    """End of an epoch; the validation figures are None where there is no validation set.

    Examples:
        >>> import prunekit as pk
        >>> digits, told = pk.open_data("digits", "train").sample(256), []
        >>> model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
        >>> config = pk.TrainConfig(epochs=1, device="cpu")
        >>> _ = pk.train(model, config, digits, state_path="run.state", on_event=told.append)
        >>> [(e.epoch, e.val_loss) for e in told if isinstance(e, pk.EpochEvent)]
        [(1, None)]
    """

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
class Scored:
    """How good a network was on the validation images after `epoch`, counted from 1; 0 is before the first."""

    epoch: int
    accuracy: float
    loss: float

    def beats(self, other: Scored) -> bool:
        """Whether it has the higher accuracy, or the same and the lower loss."""
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


@dataclass(frozen=True)
class SaveEvent:
    """The state was written to `path`.

    Examples:
        >>> import prunekit as pk
        >>> digits, told = pk.open_data("digits", "train").sample(256), []
        >>> model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
        >>> config = pk.TrainConfig(epochs=1, device="cpu")
        >>> _ = pk.train(model, config, digits, state_path="run.state", on_event=told.append)
        >>> {e.path for e in told if isinstance(e, pk.SaveEvent)}
        {'run.state'}
    """

    path: str
    epoch: int
    step: int


Event = StartEvent | StepEvent | EpochEvent | SaveEvent
Sink = Callable[[Event], object]
