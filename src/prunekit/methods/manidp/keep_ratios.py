"""Share of its channels that each layer keeps, where layers differ in what a channel is worth and what it costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunekit.methods.budget import fewest
from prunekit.methods.manidp.costs import DynamicCost

NARROWEST = 0.25  # of a layer's channels: what a linear view says of many channels at once is not to be trusted


def shares(strengths: Mapping[str, Tensor], cost: DynamicCost, keep: float) -> dict[str, float]:
    """Return the share of each layer, by name, for at most the MACs that the share `keep` of every layer costs.

    Channels go by their worth for each MAC that they save: `strengths` `(channels,)` of each layer, which must be
    comparable between layers, over what one channel less saves.
    """
    widths = torch.tensor(cost.channels, dtype=torch.float64)
    uniform = (widths * keep).unsqueeze(0)
    saved = [
        float(cost.macs(uniform) - cost.macs(uniform - step.unsqueeze(0))) for step in torch.eye(len(widths)).double()
    ]
    worth = [strengths[name].double().cpu() / saving for name, saving in zip(cost.layers, saved, strict=True)]
    limits = torch.cat(worth).sort().values

    def kept(place: int) -> Tensor:
        counts = torch.tensor([int((values >= limits[place]).sum()) for values in worth], dtype=torch.float64)
        return torch.maximum(counts, (widths * NARROWEST).ceil())

    goal = float(cost.macs(uniform))
    place = fewest(len(limits) - 1, lambda place: float(cost.macs(kept(place).unsqueeze(0))) <= goal)
    return dict(zip(cost.layers, (kept(place) / widths).tolist(), strict=True))
