"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler's state."""

from __future__ import annotations

import math

from prunekit.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Return the rate of step `step` (from 0) of `steps`: a linear warm-up, then the schedule over the rest."""
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps)
    if step < warmup:
        return config.peak_lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.peak_lr * _SHAPES[config.schedule](config, done)


def _cosine(_config: TrainConfig, done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _step(config: TrainConfig, done: float) -> float:
    return config.decay_factor ** sum(done >= milestone for milestone in config.milestones)


def _constant(_config: TrainConfig, _done: float) -> float:
    return 1.0


_SHAPES = {"cosine": _cosine, "step": _step, "constant": _constant}
