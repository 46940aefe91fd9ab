"""Training examples of each process and step, augmented: a function of seed, epoch and step alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch

from prunekit.data import Examples, seeded
from prunekit.errors import TrainingError, counted
from prunekit.training.config import TrainConfig
from prunekit.training.world import World

_ORDER, _VIEWS = 0, 1  # purposes of random numbers: the last entry of their key


class Feed:
    """The training examples of one process.

    Every epoch is one order of all examples, drawn for all processes alike; a step takes its next `batch` examples, and
    each process its share of them. Examples that do not fill the last batch wait for another epoch.
    """

    def __init__(self, data: Examples, config: TrainConfig, world: World, dtype: torch.dtype) -> None:
        self.data = data.resident(world.device)
        self.batch = _batch(config, len(data), world.size)
        self.steps = len(data) // self.batch
        self._config, self._world, self._dtype = config, world, dtype

    def epoch(self, epoch: int, first: int) -> Generator[Any, None, None]:
        """Yield the batches of an epoch from step `first` on, `config.accumulate` for each step."""
        config, world, count = self._config, self._world, len(self.data)
        order = torch.randperm(count, generator=seeded(config.seed, epoch, _ORDER))
        parts = order[: self.steps * self.batch].view(self.steps, config.accumulate, world.size, -1)
        yield from self.data.views(
            self.batch // (world.size * config.accumulate),
            parts[first:, :, world.rank].reshape(-1),
            seed=(config.seed, epoch, _VIEWS),
            augment=config.augment,
            device=world.device,
            channels_last=config.channels_last,
            dtype=self._dtype,
        )


def shares(data: Examples, batch_size: int, world: World, dtype: torch.dtype) -> Iterator[Any]:
    """Yield this process's share of a validation set, each example once."""
    order = torch.arange(world.rank, len(data), world.size)
    yield from data.batches(batch_size, device=world.device, order=order, dtype=dtype)


def _batch(config: TrainConfig, count: int, processes: int) -> int:
    parts = processes * config.accumulate
    if config.batch % parts:
        raise TrainingError(
            f"a batch of {counted(config.batch, 'image')} cannot be divided evenly into {parts} parts "
            f"({processes} processes, {config.accumulate} accumulated)",
            hint=f"use a batch size that is a multiple of {parts}",
        )
    batch = min(config.batch, count - count % parts)
    if not batch:
        raise TrainingError(f"too few for {parts} parts of a batch: {counted(count, 'training image')}")
    return batch
