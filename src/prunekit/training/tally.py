"""Sums over the examples seen, kept on the device so that reporting does not slow a GPU down."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunekit.devices import sums_in
from prunekit.training.world import World


class Tally:
    """Loss, right answers and examples since `reset`, and the first step with a loss that was not finite."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.counts_right = True
        self._dtype = sums_in(world.device)
        self.reset()

    def reset(self, values: list[float] | None = None) -> None:
        """Reset the sums, to `values` in a resumed run."""
        self._sums = torch.tensor(values or [0.0] * 3, dtype=self._dtype, device=self._world.device)
        if self._world.rank != 0:
            self._sums.zero_()  # saved sums are already over all processes
        self._bad = torch.full((), math.inf, dtype=self._dtype, device=self._world.device)

    def add(self, step: int, loss: Tensor, right: Tensor | None, count: int) -> None:
        """Add a batch of `count` examples: its mean `loss`, and how many are answered `right` where that is known."""
        loss = loss.detach().to(self._dtype)
        self.counts_right = right is not None
        correct = torch.zeros_like(loss) if right is None else right.to(self._dtype)
        self._sums += torch.stack([loss * count, correct, torch.full_like(loss, count)])
        self._bad = torch.where(torch.isfinite(loss), self._bad, self._bad.clamp(max=step))

    def totals(self) -> list[float]:
        """Return summed loss, right answers and examples, over all processes."""
        values: list[float] = self._world.summed(self._sums).tolist()
        return values

    def means(self) -> tuple[float, float | None]:
        """Return mean loss and, where right answers are counted, their share; over all processes."""
        loss, correct, count = self.totals()
        return loss / max(count, 1), correct / max(count, 1) if self.counts_right else None

    @property
    def bad_step(self) -> float:
        """The first step with a loss that was not finite in this process, or infinity."""
        return float(self._bad)
