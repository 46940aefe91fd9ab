"""Path between a layer and its consumers where its statistics can be modelled: batch norms, activations and
depthwise convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from prunekit.restoration.activations import Activation, activation_of
from prunekit.restoration.plain_layers import obstacle, reads, reads_grouped
from prunekit.restoration.refit_targets import norm_behind
from prunekit.surgery import ChannelGroup, Graph
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.ops import COPIES, HAND_ON, POOLS, is_batch_norm

_AS_IT_IS = (*COPIES, "native_dropout", "constant_pad_nd")
_PASSIVE = HAND_ON | {*POOLS, "mean", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"}  # what is overlooked


@dataclass(frozen=True)
class Stage:
    """A layer's op, the batch norm behind it, the activation behind that, and the value that it gives."""

    layer: Node
    norm: str
    activation: Activation
    value: int


def stages(model: nn.Module, graph: Graph, group: ChannelGroup) -> tuple[list[Stage], str | None]:
    """Return the stages of a group: its layer's, and those of depthwise convolutions; and why no more can be modelled.

    The reason is None where nothing but pooling and views is left between the last stage and the consumers.
    """
    reason = next(filter(None, (obstacle(model, graph, m) for m in (*group.producers, *group.consumers))), None)
    if reason is not None:
        return [], reason
    found: list[Stage] = []
    layer: Node | None = reads(graph, group.producers[0].module)[0]
    while layer is not None:
        assert layer.read is not None
        stage = _stage(model, graph, layer)
        if isinstance(stage, str):
            return found, stage
        found.append(stage)
        layer = _depthwise_behind(graph, group, stage.value)
    if group.producers[0].units.size != group.size:
        return found, "blocks of channels go together, each with statistics of its own: making up for that takes images"
    if reads_grouped(graph, group):
        return found, "a grouped convolution reads these channels: making up for that takes images"
    return found, _in_between(graph, group, found[-1].value)


def _stage(model: nn.Module, graph: Graph, layer: Node) -> Stage | str:
    assert layer.read is not None
    norm = norm_behind(model, graph, layer.read.parameter.rpartition(".")[0])
    if norm is None:
        return "no batch norm behind this layer tells its statistics"
    node = next(node for node in graph.calls(norm) if is_batch_norm(node.op))
    readers = graph.readers(node.outputs[0])
    activation = activation_of(model, readers[0]) if len(readers) == 1 else None
    if activation is None:  # a linear bottleneck, unless something else is found on the way
        return Stage(layer, norm, Activation(torch.clone), node.outputs[0])
    return Stage(layer, norm, activation, readers[0].outputs[0])


def _depthwise_behind(graph: Graph, group: ChannelGroup, value: int) -> Node | None:
    """Return the depthwise convolution that alone reads a value, if any does: channel by channel of the group."""
    readers = graph.readers(value)
    while len(readers) == 1 and readers[0].op in _AS_IT_IS:
        readers = graph.readers(readers[0].outputs[0])
    if len(readers) != 1 or readers[0].read is None or readers[0].read.groups != group.size:
        return None
    weight = readers[0].read.parameter
    own = next((member for member in group.followers if member.parameter == weight), None)
    whole = own is not None and np.array_equal(own.units, np.arange(group.size))
    return readers[0] if whole and graph.shapes[weight][:2] == (group.size, 1) else None


def _in_between(graph: Graph, group: ChannelGroup, value: int) -> str | None:
    consumers = {member.parameter for member in group.consumers}
    for member in group.consumers:
        if member.dim != 1 or member.positions.size != graph.shapes[member.parameter][1]:
            return f"'{member.module}' reads other channels as well"
    waiting, seen = list(graph.readers(value)), set()
    while waiting:
        node = waiting.pop()
        if node.index in seen or consumers.intersection(node.parameters):
            continue
        seen.add(node.index)
        if node.op not in _PASSIVE:
            return f"'{node.op}' in {node.module} stands between this layer and the next"
        waiting += graph.readers(node.outputs[0])
    return None
