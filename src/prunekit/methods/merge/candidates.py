"""Layers that `merge` may narrow: those that the layers behind them can make up for, by the way of restoration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.methods.merge.paths import Path, obstacle_to_late_norm, path_of
from prunekit.restoration.moments import obstacle_to_moments
from prunekit.restoration.plain_layers import reads, weight_of
from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.editing.compensation import places_of

MEASURED = ("calibrate", "synthetic")  # ways that refit what stays to activations, whatever stands between
BEST = "best"  # of each layer the best way without images: moments, the paper's folds, or plain pruning


@dataclass(frozen=True)
class Layer:
    """A layer whose filters may go: its group, the first module that makes it, and the batch norm right behind.

    `producer` is where the group sits in its weight: a unit may have several places, as in front of a pixel shuffle.
    `way` is how it is made up for, and `reason` tells why it can only be pruned plainly; None where it can be made up
    for. `late` is a batch norm behind the activation, which what merges has to pass.
    """

    group: ChannelGroup
    module: nn.Module
    norm: _BatchNorm | None
    producer: Member
    way: str
    reason: str | None = None
    late: _BatchNorm | None = None

    @property
    def weight(self) -> Tensor:
        """Filters, one for each unit: `(units, ...)`."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return self.by_unit(weight)

    def by_unit(self, values: Tensor) -> Tensor:
        """Return what the layer holds for each output, `(C, ...)`, by units: `(units, ...)`."""
        places = torch.from_numpy(places_of(self.producer, self.group.size))
        found = values.detach()[places.to(values.device)]  # (units, places, ...)
        return found.squeeze(1) if places.size(1) == 1 else found.flatten(1)


def candidates(model: nn.Module, graph: Graph, restore: str, scope: str) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers to narrow, and for the other groups why not.

    With `scope` "inner" these are the layers that can be made up for, or, where `restore` is `BEST`, all that are no
    residual streams; with "all", residual streams and all others too.
    """
    layers, left = [], {}
    cut = graph.balanced_groups()
    for group in graph.groups:
        maker = _maker(group)
        reason = "the network cuts these channels into equal parts" if group.name in cut else None
        reason = reason or _ruled_out(model, graph, group, maker)
        if reason is None:
            way, reason = _way(model, graph, group, restore)
            if reason is None or scope == "all" or (restore == BEST and _obstacle(model, graph, group, "none") is None):
                norm = _norm_behind(model, graph, maker.module)
                late = _path(graph, group).late if reason is None and way == "paper" else None
                late_norm = model.get_submodule(late) if late is not None else None
                assert late_norm is None or isinstance(late_norm, _BatchNorm)
                layers.append(Layer(group, model.get_submodule(maker.module), norm, maker, way, reason, late_norm))
                continue
        left[group.name] = reason
    return layers, left


def _way(model: nn.Module, graph: Graph, group: ChannelGroup, restore: str) -> tuple[str, str | None]:
    """Return how a layer is made up for, and why it cannot be, if it cannot."""
    if restore != BEST:
        return restore, _obstacle(model, graph, group, restore)
    reasons = {way: _obstacle(model, graph, group, way) for way in ("moments", "paper")}
    way = next((way for way, reason in reasons.items() if reason is None), "none")
    return way, reasons.get(way, reasons["paper"])


def _maker(group: ChannelGroup) -> Member:
    """Return the place where the first layer that makes all of these channels, if any does, makes them."""
    whole = (m for m in group.producers if len(np.unique(m.units)) == group.size)
    return next(whole, group.producers[0])


def _norm_behind(model: nn.Module, graph: Graph, layer: str) -> _BatchNorm | None:
    name = graph.batch_norm_after(layer)
    norm = None if name is None else model.get_submodule(name)
    return norm if isinstance(norm, _BatchNorm) else None


def _ruled_out(model: nn.Module, graph: Graph, group: ChannelGroup, maker: Member) -> str | None:
    """Return what no restoration helps against, so that these channels stay, or None."""
    if group.frozen:
        return next(iter(group.frozen.values()))
    producer = model.get_submodule(maker.module)
    if not isinstance(producer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        return f"its channels come from a {type(producer).__name__}"
    if maker.parameter != weight_of(maker.module) or maker.dim != 0:
        return f"its channels come from '{maker.parameter}', which is not the weight of a layer"
    if getattr(producer, "groups", 1) != 1:
        return "a grouped convolution makes these channels"
    places = np.bincount(maker.units, minlength=group.size)
    if places.min() == 0 or maker.units.size != graph.shapes[maker.parameter][0]:
        return "no layer makes all of these channels"
    if places.min() != places.max():
        return "a layer makes some of these channels more often than others"
    return None if group.consumers else "no layer reads these channels"


def _obstacle(model: nn.Module, graph: Graph, group: ChannelGroup, restore: str) -> str | None:
    if graph.is_stream(group):
        return "several layers add into these channels"
    readers = [member.module for member in group.consumers]
    if any(getattr(model.get_submodule(name), "groups", 1) != 1 for name in readers):
        return "a grouped convolution reads these channels"
    if restore != "none" and len(set(readers)) != len(readers):
        return f"'{max(readers, key=readers.count)}' reads these channels by several weights"
    if restore in (*MEASURED, "none"):
        return None
    if len(group.producers) != 1:
        return f"'{group.producers[-1].module}' scales these channels"
    maker = group.producers[0]
    norm = graph.batch_norm_after(maker.module)
    if norm is not None and maker.units.size != group.size:
        return "blocks of channels go together, each with statistics of its own"
    if norm is not None and _norm_behind(model, graph, maker.module) is None:
        return f"'{norm}' is no batch norm that is known"
    if restore == "moments":
        return obstacle_to_moments(model, graph, group)
    path = _path(graph, group)
    if path.late is not None and path.blocks is None:
        return obstacle_to_late_norm(model, graph, group, path.late)
    return path.blocks


def _path(graph: Graph, group: ChannelGroup) -> Path:
    """Return the way from the group's layer to its consumers, of all its calls: the first blocked one, or the last."""
    consumers = {member.parameter for member in group.consumers}
    found = [path_of(graph, call, consumers) for call in reads(graph, group.producers[0].module)]
    return next((path for path in found if path.blocks), found[-1])
