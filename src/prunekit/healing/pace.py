"""How many epochs fit into a time, by the measured speed of a step."""

from __future__ import annotations

import dataclasses
import time

from torch import nn

from prunekit.data import ImageSet
from prunekit.errors import InputError
from prunekit.surgery.copying import copied
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train

VIEWS = 150_000  # of images; more were not seen to help
_FILLED = 0.85  # of the time that is left: steps differ in length, and a machine has other work
_STEPS = 3  # that are timed, after one that warms up


def seconds_of_a_step(model: nn.Module, original: nn.Module, data: ImageSet, config: TrainConfig) -> float:
    """Return how long a step of healing takes, by some of a copy."""
    subject, few = copied(model), data.subset(list(range(min(len(data), config.batch))))
    once = dataclasses.replace(config, epochs=1, keep="last", lr=0.0)  # whatever rate was asked for, it has to last
    train(subject, once, few, teacher=original)
    began = time.perf_counter()
    train(subject, dataclasses.replace(once, epochs=_STEPS), few, teacher=original)
    return (time.perf_counter() - began) / _STEPS


def epochs_within(seconds: float, ready: float, step: float, images: int, batch: int) -> tuple[int, int]:
    """Return how many epochs of how many images fit into `seconds`: one of a part of them, or several of all.

    Args:
        seconds: The time.
        ready: What getting ready took of it.
        step: Seconds of one step.
        images: How many there are.
        batch: Images of a step.

    Raises:
        InputError: The time is too short for one step.
    """
    steps = int(_FILLED * (seconds - ready) / step)
    if steps < 1:
        raise InputError(
            f"{seconds:g} seconds are too short to heal: getting ready took {ready:.2g}, a step takes {step:.2g}",
            hint="give it minutes, such as --heal-time 10m",
        )
    whole = max(1, images // batch)
    if steps < whole:
        return 1, steps * batch
    return min(steps // whole, max(1, VIEWS // (whole * batch))), images
