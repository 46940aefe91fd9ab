"""Channels-last or not: which is faster depends on the widths, so it is measured."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from prunekit.evaluation.latency import least_seconds


class InLayout(nn.Module):
    """Network that runs in one memory layout, whatever that of its input is."""

    def __init__(self, network: nn.Module, layout: torch.memory_format) -> None:
        super().__init__()
        self.network = network.to(memory_format=layout)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output."""
        result: Tensor = self.network(x.contiguous(memory_format=self.layout))
        return result


def in_best_layout(network: nn.Module, images: Tensor) -> InLayout:
    """Return `network`, changed in place, in the layout in which it reads these `images` `(N, C, H, W)` faster."""
    times: dict[torch.memory_format, float] = {}
    for layout in (torch.channels_last, torch.contiguous_format):
        candidate = InLayout(network, layout)
        times[layout] = least_seconds(partial(candidate, images), images.device, warm_up=0)
    return InLayout(network, min(times, key=times.__getitem__))
