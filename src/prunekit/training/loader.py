"""Training images of each process and step, augmented: a function of seed, epoch and step alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from prunekit.data import ImageSet, augmentation, seeded
from prunekit.devices import free_memory
from prunekit.errors import TrainingError, counted
from prunekit.training.config import TrainConfig
from prunekit.training.world import World

_ORDER, _VIEWS = 0, 1  # purposes of random numbers: the last entry of their key


class Feed:
    """The training images of one process.

    Every epoch is one order of all images, drawn for all processes alike; a step takes its next `batch` images, and
    each process its share of them. Images that do not fill the last batch wait for another epoch.
    """

    def __init__(self, data: ImageSet, config: TrainConfig, world: World, dtype: torch.dtype) -> None:
        self.data = resident(data, world.device)
        self.batch = _batch(config, len(data), world.size)
        self.steps = len(data) // self.batch
        self._augment = augmentation(data.augment if config.augment == "auto" else config.augment)
        self._config, self._world, self._dtype = config, world, dtype

    def epoch(self, epoch: int, first: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield images `(n, C, H, W)` and labels `(n,)` from step `first` on, `config.accumulate` batches per step."""
        config, world, count = self._config, self._world, len(self.data)
        order = torch.randperm(count, generator=seeded(config.seed, epoch, _ORDER))
        parts = order[: self.steps * self.batch].view(self.steps, config.accumulate, world.size, -1)
        draws = self._augment.draws(count, seeded(config.seed, epoch, _VIEWS))
        home = self.data.labels.device
        yield from self.data.batches(
            self.batch // (world.size * config.accumulate),
            device=world.device,
            order=parts[first:, :, world.rank].reshape(-1).to(home),
            augment=self._augment,
            draws=draws.to(home),
            channels_last=config.channels_last,
            dtype=self._dtype,
        )


def shares(data: ImageSet, batch_size: int, world: World, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share of a validation set, each image once."""
    order = torch.arange(world.rank, len(data), world.size, device=data.labels.device)
    yield from data.batches(batch_size, device=world.device, order=order, dtype=dtype)


def resident(data: ImageSet, device: torch.device) -> ImageSet:
    """Return `data` on the device where it takes at most a quarter of the free memory there; otherwise unchanged."""
    if device.type == "cpu" or not isinstance(data.images, Tensor):
        return data
    free = free_memory(device)
    return data.to(device) if free is not None and data.images.nbytes <= free // 4 else data


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
