"""Which layers `merge` may narrow: those that the layers behind them can make up for, by the way of restoration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from prunekit.restore.moments import obstacle_to_moments
from prunekit.surgery import ChannelGroup, Graph
from prunekit.surgery.layer_rules import is_batch_norm
from prunekit.surgery.recording import Node

# Ops f with f(s x) = s f(x) for every s >= 0: a merged channel passes through them.
_HOMOGENEOUS = frozenset(
    (
        *("relu", "leaky_relu", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
        *("max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "avg_pool1d", "mean", "sum", "amax"),
        *("view", "_unsafe_view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "clone", "detach"),
        *("native_dropout", "alias", "_to_copy", "upsample_nearest2d"),
    )
)
MEASURED = ("calibrate", "synthetic")  # ways that refit what stays to activations, whatever stands between


@dataclass(frozen=True)
class Layer:
    """A layer whose filters may go: its group, the first module that makes it, and the batch norm right behind.

    `reason` tells why it can only be pruned plainly, without compensation; None where it can be made up for.
    """

    group: ChannelGroup
    module: nn.Module
    norm: nn.Module | None
    reason: str | None = None

    @property
    def weight(self) -> Tensor:
        """Filters, outputs first: `(C, ...)`."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()


def candidates(model: nn.Module, graph: Graph, restore: str, scope: str) -> tuple[list[Layer], dict[str, str]]:
    """The layers to narrow, and for the other groups why not.

    With `scope` "inner" these are the layers that can be made up for; with "all", residual streams and all others too.
    """
    modules = dict(model.named_modules())
    layers, left = [], {}
    for group in graph.groups:
        producer = _maker(group)
        reason = _ruled_out(group, modules)
        if reason is None:
            reason = _obstacle(graph, group, modules, restore)
            if reason is None or scope == "all":
                norm = graph.batch_norm_after(producer)
                layers.append(Layer(group, modules[producer], modules[norm] if norm else None, reason))
                continue
        left[group.name] = reason
    return layers, left


def _maker(group: ChannelGroup) -> str:
    """The layer that a group is named after makes all of its channels, if any layer does."""
    names = [member.module for member in group.producers]
    return group.name if group.name in names else names[0]


def _ruled_out(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> str | None:
    """What no restoration helps against: these channels stay."""
    if group.frozen:
        return next(iter(group.frozen.values()))
    producer = modules.get(_maker(group))
    if not isinstance(producer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        return f"its channels come from a {type(producer).__name__}"
    if getattr(producer, "groups", 1) != 1:
        return "a grouped convolution makes these channels"
    if len(producer.weight) != group.size:
        return "no layer makes all of these channels"
    return None if group.consumers else "no layer reads these channels"


def _obstacle(graph: Graph, group: ChannelGroup, modules: Mapping[str, nn.Module], restore: str) -> str | None:
    if len(group.producers) != 1:
        return "several layers add into these channels"
    if any(getattr(modules[member.module], "groups", 1) != 1 for member in group.consumers):
        return "a grouped convolution reads these channels"
    if restore in MEASURED:
        return None
    consumers = {member.parameter for member in group.consumers}
    for call in graph.calls(group.producers[0].module):
        if call.op in ("convolution", "addmm", "mm"):
            reason = _blocked(graph, call, consumers)
            if restore == "moments":
                reason = obstacle_to_moments(graph, group)
            if reason:
                return reason
    return None


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
