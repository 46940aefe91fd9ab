"""The objective of ManiDP on prunekit's training loop: cross-entropy, complexity and similarity, and thresholds that
follow the schedule (Tang et al., CVPR 2021, equations 4 to 12).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from prunekit.devices import precise, sums_in
from prunekit.errors import InputError
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.costs import DynamicCost
from prunekit.nn.gated import GatedConv, gated_layers
from prunekit.surgery.execution.hooks import hooked
from prunekit.tasks.base import Batch, Task
from prunekit.tasks.nests import size_of
from prunekit.training.config import TrainConfig
from prunekit.training.objective import Objective, matching_of
from prunekit.training.world import World


class ManifoldObjective(Objective):
    """`loss + lambda' * complexity + gamma * similarity`.

    Complexity: `sum_l mean_i (max(0, C - CE_i) / C) mean_c pi_l(x_i)`, with `C` tau times the mean loss of the epoch
    before, and `CE_i` the loss of an example (of its whole batch, where the task tells no other); its weight is a
    constant, so that it cannot be lowered by making easy images hard. Similarity: `sum_l |R_l - T_l|^2 / N^2` of the
    cosine Gram matrices `(N, N)` of pooled feature maps and saliencies.

    After every epoch but the first (or more often, see `GateRecipe.renewals`), a layer's threshold becomes the k-th
    largest of the mean saliencies that its channels had in it, `k = ceil(r c)`; `shares` names layers that end at
    another share than `recipe.keep`.
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
        super().__init__(config, teacher, task, matching_of(model, config, teacher))
        self._recipe = recipe
        self._layers = dict(gated_layers(model))
        if not self._layers:
            raise InputError("this network has no gates to train")
        self._cost = cost
        self._pi: list[Tensor] = []
        self._maps: list[Tensor] = []
        device = next(model.parameters()).device
        zeros = partial(torch.zeros, dtype=sums_in(device), device=device)
        self._mean_loss, self._losses, self._kept, self._renewed = zeros(()), zeros(2), zeros(2), zeros(())
        kept = [(shares or {}).get(name, recipe.keep) for name in self._cost.layers]
        self._relative = torch.tensor(kept, dtype=torch.float64) / recipe.keep
        self._sums = zeros(sum(self._cost.channels) + 1)  # of saliencies since thresholds were set; last, of images
        self._figures: dict[str, float] = {}
        self.own_rate = recipe.rate_of_gates
        self.own = frozenset(
            name for name, _ in model.named_parameters() if any(name.startswith(f"{n}.gate.") for n in self._layers)
        )
        self._watching = contextlib.ExitStack()
        self._watching.enter_context(hooked(hook for layer in self._layers.values() for hook in self._watch(layer)))

    def __call__(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Return the loss of a batch, and the network's output."""
        loss, output = super().__call__(network, batch)
        pi, maps = [p.float() for p in self._pi], [m.float() for m in self._maps]
        self._pi, self._maps = [], []
        each = self.task.losses(output, batch)
        losses = (loss.expand(size_of(batch)) if each is None else each).detach()
        complexity, similarity = self._recipe.losses
        if complexity:
            loss = loss + complexity * self._complexity(pi, losses)
        if similarity:
            if self._recipe.informed:  # the layers have been fitted: the gates follow them, not they the gates
                maps = [m.detach() for m in maps]
            loss = loss + similarity * sum(map(unlikeness, maps, pi))
        self._count(pi, losses)
        return loss, output

    def begin(self, mean_loss: Callable[[], float]) -> None:
        """Measure the mean loss that tells easy images from hard ones in the first epoch."""
        self._mean_loss.fill_(mean_loss())

    def end_epoch(self, epoch: int, epochs: int, world: World) -> None:
        """Set the mean loss anew, from what all processes saw in this epoch."""
        del epoch, epochs
        losses = world.summed(self._losses)
        self._mean_loss.copy_(losses[0] / losses[1])
        self._figures = self._measured(world)
        self._losses.zero_()
        self._kept.zero_()

    def end_step(self, progress: float, epochs: int, world: World) -> None:
        """Set new thresholds, `renewals` times an epoch; the first time nothing is pruned yet."""
        times = math.floor(progress * self._recipe.renewals(epochs) + 1e-9)
        if times <= int(self._renewed):
            return
        sums = world.summed(self._sums)
        if not bool(sums[-1]):  # no image since the last time
            return
        if times > 1:
            rate = self._recipe.keep_rate(progress, epochs)
            totals = torch.split(sums[:-1], list(self._cost.channels))
            for layer, total, relative in zip(self._layers.values(), totals, self._relative.tolist(), strict=True):
                means = (total / sums[-1]).sort(descending=True).values
                wanted = math.ceil(
                    min(1.0, rate * relative) * len(means) - 1e-9
                )  # not one more where the product is rounded up
                layer.threshold.copy_(means[wanted - 1])
        self._renewed.fill_(times)
        self._sums.zero_()

    def figures(self) -> dict[str, float]:
        """Return the share of channels that images kept, and of the MACs that they cost, in this epoch so far (this
        process) or, at its end, in all of it.
        """
        return self._figures or self._measured(None)

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far, the mean loss of the epoch before, and how often thresholds were set."""
        names = ("mean_loss", "losses", "sums", "kept", "renewed", "relative")
        return {**super().state(), **{name: getattr(self, f"_{name}") for name in names}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        super().restore(state)
        matched = super().state().keys()
        for name, own in self.state().items():
            if name not in matched:
                own.copy_(state[name])

    def close(self) -> None:
        """Stop watching the gates."""
        super().close()
        self._watching.close()

    def _watch(self, layer: GatedConv) -> Iterator[RemovableHandle]:
        def saliencies(_: nn.Module, __: Any, pi: Tensor, *, layer: GatedConv) -> None:
            if layer.training:
                self._pi.append(pi)

        def feature_map(_: nn.Module, __: Any, y: Tensor, *, layer: GatedConv) -> None:
            if layer.training and self._recipe.losses[1]:
                self._maps.append(pooled(layer, y))

        yield layer.gate.register_forward_hook(partial(saliencies, layer=layer))
        yield layer.norm.register_forward_hook(partial(feature_map, layer=layer))

    def _complexity(self, pi: list[Tensor], losses: Tensor) -> Tensor:
        limit = (self._recipe.tau * self._mean_loss).to(losses.dtype)
        ease = ((limit - losses) / limit.clamp(min=1e-12)).clamp(min=0)
        return torch.stack([(ease * p.mean(1)).mean() for p in pi]).sum()

    @torch.no_grad()
    def _count(self, pi: list[Tensor], losses: Tensor) -> None:
        self._figures = {}
        count = losses.new_full((1,), len(losses))
        self._sums += precise(torch.cat([*(p.sum(0) for p in pi), count]))
        self._losses += torch.stack([precise(losses.sum()), precise(losses.new_tensor(len(losses)))])
        on = [(layer.kept(p) > 0).sum(1) for layer, p in zip(self._layers.values(), pi, strict=True)]
        kept = torch.stack(on, 1)
        share = precise(kept) / torch.tensor(self._cost.channels, device=kept.device)
        macs = self._cost.macs(kept).to(share) / self._cost.dense
        self._kept += torch.stack([share.mean(1).sum(), macs.sum()])

    def _measured(self, world: World | None) -> dict[str, float]:
        kept, count = self._kept, self._losses[1]
        if world is not None:
            kept, count = world.summed(kept), world.summed(count)
        if not count:
            return {}
        share, macs = (kept / count).tolist()
        return {"kept": share, "macs": macs}


def pooled(layer: GatedConv, y: Tensor) -> Tensor:
    """Return the layer's feature map just before masking, averaged over positions, `(N, C, ...)` -> `(N, C)`; with the
    ReLU that follows, where one does.
    """
    return (F.relu(y) if layer.made_by.rectified else y).flatten(2).mean(2)


def unlikeness(features: Tensor, pi: Tensor) -> Tensor:
    """Return `|R - T|^2 / N^2` of the cosine Gram matrices of pooled features and saliencies, each `(N, C)`."""
    return (gram(features) - gram(pi)).square().mean()


def gram(rows: Tensor) -> Tensor:
    """Return the cosines between rows, `(N, C)` -> `(N, N)`."""
    unit = F.normalize(rows, dim=1)
    return unit @ unit.t()
