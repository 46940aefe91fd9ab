"""The loss of a training step: cross-entropy, with distillation where there is a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.training.config import TrainConfig
from prunekit.training.forward import answer, class_scores
from prunekit.training.matching import Matching
from prunekit.training.world import World

_AUXILIARY = 0.3  # weight of auxiliary classifiers (Szegedy et al., "Going Deeper with Convolutions", 2015)


def at_least_float(logits: Tensor) -> Tensor:
    """Return logits of a half-precision network in float32; others unchanged."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Objective:
    """Cross-entropy with distillation: `(1 - d) * CE + d * (T² * KL(teacher / T || student / T) + m * B)`.

    Hinton et al., 2015, and the distance `B` between the outputs of blocks (`Matching`), weighted by `m`; `d = 0`
    without a teacher. A method with another loss extends it: it may keep tensors of its own from step to step
    (`state`), act on the network between epochs (`end_epoch`), and report (`figures`).
    """

    own: frozenset[str] = frozenset()
    """Names of the method's own parameters: they have no weight decay, and their learning rate is `own_rate` times the
    network's.
    """
    own_rate: float = 1.0

    def __init__(self, config: TrainConfig, teacher: nn.Module | None, matching: Matching | None = None) -> None:
        self._smoothing = config.label_smoothing
        self._share = config.teacher_share if teacher is not None else 0.0
        self._temperature = config.temperature
        self._teacher, self._matching, self._match = teacher, matching, config.match or 0.0

    @classmethod
    def of(cls, model: nn.Module, config: TrainConfig, teacher: nn.Module | None) -> Objective:
        """Return the objective of a run that trains `model`."""
        matched = teacher is not None and config.match and config.teacher_share
        return cls(config, teacher, Matching(model, teacher) if matched and teacher is not None else None)

    def __call__(self, output: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss over a batch, and the logits `(N, classes)` of the main classifier."""
        scores, auxiliary = class_scores(output, len(labels))
        logits = at_least_float(scores)
        loss = self._cross_entropy(logits, labels)
        if self._teacher is not None:
            loss = (1 - self._share) * loss + self._share * self._distance(logits, images)
        for other in auxiliary:
            loss = loss + _AUXILIARY * self._cross_entropy(at_least_float(other), labels)
        return loss, logits.detach()

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

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self._smoothing)

    def _distance(self, logits: Tensor, images: Tensor) -> Tensor:
        assert self._teacher is not None
        t = self._temperature
        with torch.no_grad():
            scores, _ = class_scores(answer(self._teacher, images), len(images))
            wanted = F.log_softmax(at_least_float(scores) / t, dim=1)
        ours = F.log_softmax(logits / t, dim=1)
        answers = F.kl_div(ours, wanted, reduction="batchmean", log_target=True) * t * t
        blocks = self._matching.distance() if self._matching is not None else None
        return answers if blocks is None else answers + self._match * blocks
