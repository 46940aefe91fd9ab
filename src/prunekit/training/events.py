"""Events that a training run reports. Only the first of several processes reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prunekit.metric import ACCURACY, Metric


@dataclass(frozen=True)
class StartEvent:
    """A run begins or resumes at `epoch` and `step`, both 0 for a new run.

    `batch` images (or other examples, as `noun` calls them) make a step, and `lr` is the learning rate at its peak.

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
    noun: str = "image"


@dataclass(frozen=True)
class StepEvent:
    """Progress of a run: `loss` and `accuracy` (0 to 1) over this epoch's training examples so far.

    `accuracy` is None for a task whose score is no share of right answers.

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
    accuracy: float | None
    lr: float
    sparsity: float | None
    images_per_second: float
    eta: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EpochEvent:
    """End of an epoch; the validation figures are None where there is no validation set.

    `val_score` is the score that counts, which `metric` names; `accuracy` and `val_accuracy` are None where that is
    another.

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
    accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    lr: float
    sparsity: float | None
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)
    val_score: float | None = None
    metric: Metric = ACCURACY

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EpochEvent:
        """Read the JSON of its fields."""
        return cls(**{**data, "metric": Metric.from_json(data["metric"])})


@dataclass(frozen=True)
class Scored:
    """How good a network was on the validation examples after `epoch`, counted from 1; 0 is before the first."""

    epoch: int
    score: float
    loss: float

    def beats(self, other: Scored, metric: Metric) -> bool:
        """Whether it has the better score, or the same and the lower loss."""
        ours, theirs = metric.goodness(self.score), metric.goodness(other.score)
        return (ours, -self.loss) > (theirs, -other.loss)


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
