"""Which layers `merge` may narrow: those that the layers behind them can make up for, by the way of restoration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.restore.moments import obstacle_to_moments
from prunekit.restore.plain import reads, weight_of
from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.fold import places_of
from prunekit.surgery.layer_rules import is_batch_norm
from prunekit.surgery.recording import Node

# Ops f with f(s x) = s f(x) for every s >= 0: a merged channel passes through them.
_HOMOGENEOUS = frozenset(
    (
        *("relu", "leaky_relu", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
        *("max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "avg_pool1d", "mean", "sum", "amax"),
        *("view", "_unsafe_view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "clone", "detach"),
        *("native_dropout", "alias", "_to_copy", "upsample_nearest2d", "slice"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "col2im"),
    )
)
MEASURED = ("calibrate", "synthetic")  # ways that refit what stays to activations, whatever stands between


@dataclass(frozen=True)
class Layer:
    """A layer whose filters may go: its group, the first module that makes it, and the batch norm right behind.

    `producer` is where the group sits in its weight: a unit may have several places, as in front of a pixel shuffle.
    `reason` tells why it can only be pruned plainly, without compensation; None where it can be made up for.
    """

    group: ChannelGroup
    module: nn.Module
    norm: _BatchNorm | None
    producer: Member
    reason: str | None = None

    @property
    def weight(self) -> Tensor:
        """Filters, one for each unit: `(units, ...)`."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return self.by_unit(weight)

    def by_unit(self, values: Tensor) -> Tensor:
        """What the layer holds for each output, `(C, ...)`, by units: `(units, ...)`."""
        places = torch.from_numpy(places_of(self.producer, self.group.size))
        found = values.detach()[places.to(values.device)]  # (units, places, ...)
        return found.squeeze(1) if places.size(1) == 1 else found.flatten(1)


def candidates(model: nn.Module, graph: Graph, restore: str, scope: str) -> tuple[list[Layer], dict[str, str]]:
    """The layers to narrow, and for the other groups why not.

    With `scope` "inner" these are the layers that can be made up for; with "all", residual streams and all others too.
    """
    layers, left = [], {}
    cut = graph.balanced_groups()
    for group in graph.groups:
        maker = _maker(group)
        reason = "the network cuts these channels into equal parts" if group.name in cut else None
        reason = reason or _ruled_out(model, graph, group, maker)
        if reason is None:
            reason = _obstacle(model, graph, group, restore)
            if reason is None or scope == "all":
                norm = _norm_behind(model, graph, maker.module)
                layers.append(Layer(group, model.get_submodule(maker.module), norm, maker, reason))
                continue
        left[group.name] = reason
    return layers, left


def _maker(group: ChannelGroup) -> Member:
    """Where the first layer that makes all of these channels, if any does, makes them."""
    whole = (m for m in group.producers if len(np.unique(m.units)) == group.size)
    return next(whole, group.producers[0])


def _norm_behind(model: nn.Module, graph: Graph, layer: str) -> _BatchNorm | None:
    name = graph.batch_norm_after(layer)
    norm = None if name is None else model.get_submodule(name)
    return norm if isinstance(norm, _BatchNorm) else None


def _ruled_out(model: nn.Module, graph: Graph, group: ChannelGroup, maker: Member) -> str | None:
    """What no restoration helps against: these channels stay."""
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
    if len(group.producers) != 1:
        return "several layers add into these channels"
    readers = [member.module for member in group.consumers]
    if any(getattr(model.get_submodule(name), "groups", 1) != 1 for name in readers):
        return "a grouped convolution reads these channels"
    if restore != "none" and len(set(readers)) != len(readers):
        return f"'{max(readers, key=readers.count)}' reads these channels by several weights"
    if restore in MEASURED:
        return None
    maker = group.producers[0]
    norm = graph.batch_norm_after(maker.module)
    if norm is not None and maker.units.size != group.size:
        return "blocks of channels go together, each with statistics of its own"
    if norm is not None and _norm_behind(model, graph, maker.module) is None:
        return f"'{norm}' is no batch norm that is known"
    if restore == "moments":
        return obstacle_to_moments(model, graph, group)
    consumers = {member.parameter for member in group.consumers}
    calls = reads(graph, maker.module)
    return next(filter(None, (_blocked(graph, call, consumers) for call in calls)), None)


def _blocked(graph: Graph, producer: Node, consumers: set[str]) -> str | None:
    """The first op between a layer and its consumers that a scale does not pass, or None."""
    waiting = [(reader, True) for reader in graph.readers(producer.outputs[0])]
    seen = set()
    while waiting:
        node, first = waiting.pop()
        if node.index in seen or consumers.intersection(node.parameters):
            continue
        seen.add(node.index)
        if not (node.op in _HOMOGENEOUS or (first and is_batch_norm(node.op))):
            return f"'{node.op}' in {node.module} stands between this layer and the next"
        if node.outputs:
            waiting += [(reader, False) for reader in graph.readers(node.outputs[0])]
    return None
