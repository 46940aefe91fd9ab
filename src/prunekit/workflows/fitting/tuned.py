"""Tuning of a candidate with distillation from the original, ended by the clock where a plan was too hopeful."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from prunekit.data import Examples, ImageSet
from prunekit.data.splits import held_out
from prunekit.spec import origin_of, remember
from prunekit.surgery.copying import copied
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import Event, Sink
from prunekit.training.fine_tuning import cut_since_training, suited

_SAMPLE = 512  # images by which an epoch is timed


class TimeIsUpError(Exception):
    """The time was over before a tuning was done."""


@dataclass(frozen=True)
class Tuner:
    """Tunes candidates in place, with labels and with the outputs of the original.

    Attributes:
        original: The network to distil from.
        train_set: Labelled images to tune on.
        val_set: A part of the training images that is left out; the weights that do best on it are kept.
        device: Where to train.
        on_event: Called with the events of each tuning.
    """

    original: nn.Module
    train_set: Examples
    val_set: Examples
    device: str
    on_event: Sink | None = None

    @classmethod
    def of(cls, original: nn.Module, train_set: Examples, device: str, on_event: Sink | None = None) -> Tuner:
        """Return the tuner that leaves every tenth image (of each class) out of `train_set`, for choosing the epoch."""
        if isinstance(train_set, ImageSet):
            rest, tenth = (held_out(train_set.labels, part, name=train_set.name) for part in ("train", "val"))
        else:
            left_out = torch.arange(len(train_set)) % 10 == 9
            rest, tenth = ((~left_out).nonzero().flatten(), left_out.nonzero().flatten())
        return cls(original, train_set.subset(rest), train_set.subset(tenth), device, on_event)

    def tune(self, model: nn.Module, epochs: int, deadline: float) -> None:
        """Tune `model`, in place.

        Args:
            model: A pruned network.
            epochs: How long.
            deadline: When to give up, as `time.perf_counter` counts.

        Raises:
            TimeIsUpError: The deadline has passed.
            PrunekitError: The tuning cannot go on.
        """

        def watch(event: Event) -> None:
            if time.perf_counter() > deadline:
                raise TimeIsUpError
            if self.on_event:
                self.on_event(event)

        config = suited(self._config(epochs), len(self.train_set), cut_since_training(model), taught=True)
        done = train(model, config, self.train_set, self.val_set, teacher=self.original, on_event=watch)
        origin = origin_of(model)
        if origin is not None:
            remember(model, origin.after(done.step(config)))

    def seconds_of_an_epoch(self, model: nn.Module) -> float:
        """Return how long an epoch of `model` takes, by tuning a copy on a few images."""
        few = self.train_set.sample(min(_SAMPLE, len(self.train_set)))
        config = suited(self._config(1), len(self.train_set), 0.0, taught=True)
        done = train(copied(model), config, few, teacher=self.original)
        return done.history[0].seconds * len(self.train_set) / len(few)

    def _config(self, epochs: int) -> TrainConfig:
        return TrainConfig(epochs=epochs, device=self.device)
