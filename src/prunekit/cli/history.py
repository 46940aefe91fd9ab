"""Record of a training run in a network's history."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from prunekit.spec import Origin, origin_of, remember

if TYPE_CHECKING:
    from torch import nn

    from prunekit.data import ImageSet
    from prunekit.training.config import TrainConfig
    from prunekit.training.entry import TrainResult


def remember_run(model: nn.Module, images: ImageSet, config: TrainConfig, result: TrainResult) -> None:
    """Remember in `model` the preparation of its images, and the run as a step of history."""
    origin = dataclasses.replace(origin_of(model) or Origin(""), input=images.input_spec)
    remember(model, origin.after(result.step(config)))
