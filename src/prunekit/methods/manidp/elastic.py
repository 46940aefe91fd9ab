"""Training of one gated network for every budget in a range: each step has a budget of its own.

The smallest and the largest budget come every fourth step each, and one drawn at random in the steps between (after the
sandwich rule of Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019, with one
forward pass a step in place of several). Thresholds for a budget are quantiles of what the gates said of the latest
images: the same family in which `thresholds.py` looks for them in the end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.costs import DynamicCost
from prunekit.methods.manidp.objective import ManifoldObjective
from prunekit.methods.manidp.thresholds import Thresholds, log_odds
from prunekit.tasks.base import Batch, Task
from prunekit.training.config import TrainConfig
from prunekit.training.world import World

_ROWS = 8  # budgets that thresholds are found for; those between are interpolated
_STEPS = 20  # between new thresholds
_FRESH = 0.3  # weight of the latest images in them
_STEP = 0.05  # of the MACs, between budgets that are stored


class ElasticObjective(ManifoldObjective):
    """The losses of `ManifoldObjective` with thresholds for another budget in each step; between the steps the network
    has those for the middle of the range.

    `shares` `(0 to 1)` of channels that layers start with decide which of them close first.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        teacher: nn.Module | None,
        task: Task,
        recipe: GateRecipe,
        cost: DynamicCost,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(model, config, teacher, task, recipe, cost)
        assert recipe.span is not None
        self._low, self._high = recipe.span
        self._seed = config.seed
        odds = [log_odds(1 - (shares or {}).get(name, 0.5)) for name in cost.layers]
        self._odds = torch.tensor(odds, dtype=torch.float64)
        present = torch.stack([layer.threshold.detach() for layer in self._layers.values()])
        self._table = present.repeat(_ROWS, 1)  # the thresholds of each budget, from the smallest on
        self._steps = torch.zeros_like(present[0])
        self._saliencies: tuple[Tensor, ...] = ()

    def __call__(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Return the loss of a batch at the budget of this step, and the network's output."""
        self._use(self._place(int(self._steps)))
        try:
            return super().__call__(network, batch)
        finally:
            self._use(0.5)

    def end_step(self, progress: float, epochs: int, world: World) -> None:
        """Count the step, and set the thresholds of all budgets anew by the latest images."""
        step = int(self._steps)
        if step % _STEPS == 1:  # a step whose budget was drawn
            fresh = world.summed(self._found(self._recipe.closed(progress, epochs))) / world.size
            self._table.lerp_(fresh.to(self._table), 1.0 if step == 1 else _FRESH)
            self._use(0.5)
        self._steps += 1

    def state(self) -> dict[str, Tensor]:
        """Return what `ManifoldObjective.state` does, with the thresholds of all budgets, the steps so far and the odds
        of layers.
        """
        return {**super().state(), "table": self._table, "steps": self._steps, "odds": self._odds}

    def _place(self, step: int) -> float:
        """Return where in the range, 0 to 1, the budget of a step lies; the same in every process and resumed run."""
        if step % 2 == 0:
            return 0.0 if step % 4 == 0 else 1.0
        return float(torch.rand((), generator=torch.Generator().manual_seed(self._seed * 1_000_003 + step)))

    @torch.no_grad()
    def _use(self, place: float) -> None:
        row = place * (_ROWS - 1)
        below = min(int(row), _ROWS - 2)
        for layer, value in zip(
            self._layers.values(), torch.lerp(self._table[below], self._table[below + 1], row - below), strict=True
        ):
            layer.threshold.copy_(value)

    def _found(self, closed: float) -> Tensor:
        """Return thresholds `(budgets, layers)` at which the latest images cost what each budget allows."""
        family = Thresholds(tuple(pi.flatten().sort().values for pi in self._saliencies), tuple(self._odds.tolist()))
        rows = []
        for number in range(_ROWS):
            budget = self._low + (self._high - self._low) * number / (_ROWS - 1)
            aim = (1 - (1 - budget) * closed) * self._cost.dense
            shift = family.shift_for(self._saliencies, lambda kept: float(self._cost.macs(kept).mean()), aim)
            rows.append(family.at(shift))
        return torch.tensor(rows, dtype=self._table.dtype, device=self._table.device)

    def _count(self, pi: list[Tensor], losses: Tensor) -> None:
        super()._count(pi, losses)
        self._saliencies = tuple(one.detach().cpu() for one in pi)


def stored_budgets(low: float, high: float) -> dict[str, float]:
    """Return the budgets of a range that a trained network gets thresholds for, by name, as shares of the MACs: its
    ends and the multiples of five percent between them, the middle one first.
    """
    first, last = math.floor(low / _STEP + 1e-9) + 1, math.ceil(high / _STEP - 1e-9)
    found = [low, *(number * _STEP for number in range(first, last)), high]
    middle = len(found) // 2
    ordered = itertools.chain([found[middle]], found[:middle], found[middle + 1 :])
    return {f"{share * 100:g}%": share for share in (round(share, 6) for share in ordered)}
