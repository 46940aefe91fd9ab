"""The loss of a training step: that of the task, with distillation where there is a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.tasks.base import Batch, Task
from prunekit.tasks.calls import loss_of
from prunekit.training.config import TrainConfig
from prunekit.training.forward import answer
from prunekit.training.matching import Matching
from prunekit.training.world import World


class Objective:
    """The loss of the task with distillation: `(1 - d) * loss + d * (distance to the teacher + m * B)`.

    `d = 0` without a teacher. The distance of class scores is `T² * KL(teacher / T || student / T)` (Hinton et al.,
    2015), and `B` that between the outputs of blocks (`Matching`), weighted by `m`. A method with another loss extends
    it: it may keep tensors of its own from step to step (`state`), act on the network between epochs (`end_epoch`), and
    report (`figures`).
    """

    own: frozenset[str] = frozenset()
    """Names of the method's own parameters: they have no weight decay, and their learning rate is `own_rate` times the
    network's.
    """
    own_rate: float = 1.0

    def __init__(
        self, config: TrainConfig, teacher: nn.Module | None, task: Task, matching: Matching | None = None
    ) -> None:
        self.task = task
        self._smoothed = _smoothed(task, config.label_smoothing)
        self._share = config.teacher_share if teacher is not None else 0.0
        self._temperature = config.temperature
        self._teacher, self._matching, self._match = teacher, matching, config.match or 0.0

    @classmethod
    def of(cls, model: nn.Module, config: TrainConfig, teacher: nn.Module | None, task: Task) -> Objective:
        """Return the objective of a run that trains `model`."""
        return cls(config, teacher, task, matching_of(model, config, teacher))

    def __call__(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Return the mean loss of `network` over a batch, and its output."""
        loss, output = loss_of(self._smoothed, network, batch)
        if self._teacher is not None:
            loss = (1 - self._share) * loss + self._share * self._distance(output, batch)
        return loss, output

    def begin(self, mean_loss: Callable[[], float]) -> None:
        """Start a new run; `mean_loss` measures the cross-entropy on training images, without augmentation."""

    def end_step(self, progress: float, epochs: int, world: World) -> None:
        """Note the end of an optimiser step, `progress` epochs (with fractions) of `epochs` into the run."""

    def end_epoch(self, epoch: int, epochs: int, world: World) -> None:
        """Note the end of epoch `epoch` (from 0) of `epochs`; every process is here, and nothing was validated yet."""

    def figures(self) -> dict[str, float]:
        """Return the figures to report beside loss and accuracy."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run needs; sums are this process's own."""
        return {} if self._matching is None else self._matching.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that `state` returned."""
        if self._matching is not None:
            self._matching.restore(state)

    def close(self) -> None:
        """Release the network after the run has finished or failed."""
        if self._matching is not None:
            self._matching.close()

    def _distance(self, output: Any, batch: Batch) -> Tensor:
        assert self._teacher is not None
        with torch.no_grad():
            wanted = answer(self._teacher, self.task.inputs(batch))
        answers = self.task.distance(output, wanted, self._temperature)
        blocks = self._matching.distance() if self._matching is not None else None
        return answers if blocks is None else answers + self._match * blocks


def matching_of(model: nn.Module, config: TrainConfig, teacher: nn.Module | None) -> Matching | None:
    """Return what compares the blocks of `model` with those of its teacher; None where they do not count."""
    return Matching(model, teacher) if teacher is not None and config.match and config.teacher_share else None


def _smoothed(task: Task, share: float) -> Task:
    """Return the task with label smoothing, for its training loss.

    Raises:
        InputError: It knows none.
    """
    if not share:
        return task
    if not hasattr(task, "label_smoothing"):
        raise InputError(f"--label-smoothing is for classes, and the task {task.name} knows none")
    smoothed: Any = copy.copy(task)
    smoothed.label_smoothing = share
    return smoothed  # type: ignore[no-any-return]
