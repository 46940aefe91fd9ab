"""Batch-norm statistics of a healed network: the ones it began with, moved as far as they move on the same images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunekit.nn.norms import norms_of
from prunekit.restoration.norm_alignment import aligned
from prunekit.surgery import Graph

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Running mean and variance, `(C,)` each, of batch norms by name."""


def statistics_of(model: nn.Module) -> Statistics:
    """Return copies of the running statistics of a network."""
    found: Statistics = {}
    for name, norm in norms_of(model):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        found[name] = norm.running_mean.clone(), norm.running_var.clone()
    return found


def measured(model: nn.Module, graph: Graph, images: Tensor) -> Statistics:
    """Return the statistics of what the norms of a network are given for `images`; the network stays as it is."""
    return statistics_of(aligned(model, graph, images))


@torch.no_grad()
def move(model: nn.Module, before: Statistics, shown: Statistics, now: Statistics) -> None:
    """Set the statistics of `model`, in place: those `before`, moved from those `shown` to those `now`.

    What few images tell wrongly is in both measurements, and drops out.
    """
    for name, norm in norms_of(model):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = before[name]
        old, new = shown[name], now[name]
        scale = (variance + norm.eps) / (old[1] + norm.eps)
        norm.running_mean.copy_(mean + (new[0] - old[0]) * scale.sqrt())
        norm.running_var.copy_(((new[1] + norm.eps) * scale - norm.eps).clamp_min(0))
