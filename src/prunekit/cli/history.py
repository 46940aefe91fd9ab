"""Record of a training run in a network's history."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from prunekit.spec import Origin, origin_of, remember

if TYPE_CHECKING:
    from torch import nn

    from prunekit.data import Examples
    from prunekit.training.config import TrainConfig
    from prunekit.training.entry import TrainResult


def remember_run(model: nn.Module, images: Examples, config: TrainConfig, result: TrainResult) -> None:
    """Remember in `model` the preparation of its images, and the run as a step of history."""
    origin = origin_of(model) or Origin("")
    origin = dataclasses.replace(origin, input=images.input_spec or origin.input)
    remember(model, origin.after(result.step(config)))
