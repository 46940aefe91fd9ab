"""Path between a layer and its consumers where its statistics can be modelled: norms, activations and depthwise
convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from prunekit.restoration.activations import Activation, activation_of
from prunekit.restoration.plain_layers import bias_of, in_between, is_plain_norm, obstacle, reads, reads_grouped
from prunekit.restoration.refit_targets import norm_behind
from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.ops import COPIES, HAND_ON, NEAREST_UPSAMPLES, NORMS, POOLS, is_batch_norm

_AS_IT_IS = (*COPIES, "native_dropout", "constant_pad_nd")
_PADS = ("constant_pad_nd", "reflection_pad2d", "replication_pad2d")
_PASSIVE = HAND_ON | {*POOLS, *NEAREST_UPSAMPLES, *_PADS, "mean", "cat"}  # what is overlooked
_BY_IMAGES = "making up for that takes images"


@dataclass(frozen=True)
class Stage:
    """A layer's op, the norm that tells its statistics, the activation behind them, and the value that it gives.

    The norm is a batch norm right behind the layer, or one of any kind `in_front`.
    """

    layer: Node
    norm: Node
    activation: Activation
    value: int
    in_front: bool = False


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
        stage = _stage(model, graph, layer, first=not found)
        if isinstance(stage, str):
            return found, stage
        found.append(stage)
        layer = _depthwise_behind(graph, group, stage.value)
    if group.producers[0].units.size != group.size:
        return found, f"blocks of channels go together, each with statistics of its own: {_BY_IMAGES}"
    if reads_grouped(graph, group):
        return found, f"a grouped convolution reads these channels: {_BY_IMAGES}"
    return found, _in_between(graph, group, found[-1].value)


def _stage(model: nn.Module, graph: Graph, layer: Node, *, first: bool) -> Stage | str:
    assert layer.read is not None
    name = layer.read.parameter.rpartition(".")[0]
    behind = norm_behind(model, graph, name)
    if behind is not None:
        norm = node = next(node for node in graph.calls(behind) if is_batch_norm(node.op))
    else:
        front = _norm_in_front(model, graph, layer) if first else None
        if front is None:
            return "no batch norm behind this layer tells its statistics, and no norm in front of it"
        norm, node = front, _with_bias(graph, layer, bias_of(name))
    readers = graph.readers(node.outputs[0])
    activation = activation_of(model, readers[0]) if len(readers) == 1 else None
    if activation is None:  # a linear bottleneck, unless something else is found on the way
        return Stage(layer, norm, Activation(torch.clone), node.outputs[0], behind is None)
    return Stage(layer, norm, activation, readers[0].outputs[0], behind is None)


def _norm_in_front(model: nn.Module, graph: Graph, layer: Node) -> Node | None:
    """Return the norm whose channels, all of them and as they are, a layer reads; None where there is none."""
    assert layer.read is not None
    maker = graph.maker(layer.inputs[0])
    while maker is not None and maker.op in HAND_ON and len(maker.inputs) == 1:
        maker = graph.maker(maker.inputs[0])
    if maker is None or maker.op not in NORMS or layer.read.groups != 1:
        return None
    if is_batch_norm(maker.op):
        name = maker.parameters[0].rpartition(".")[0] if maker.parameters else ""
        plain = bool(name) and is_plain_norm(model, graph, name)
        normalised = graph.slots.get((f"{name}.running_mean", 0)) if plain else None
    else:
        normalised = graph.normalised.get(maker.index)
    read = graph.slots.get((layer.read.parameter, layer.read.dim))
    return maker if normalised is not None and read is not None and np.array_equal(normalised, read) else None


def _with_bias(graph: Graph, layer: Node, bias: str) -> Node:
    """Return the last op before anything is done to what a layer gives: reshaping, and adding its bias."""
    node = layer
    while True:
        readers = graph.readers(node.outputs[0])
        if len(readers) != 1 or not (readers[0].op in HAND_ON or readers[0].parameters == (bias,)):
            return node
        node = readers[0]


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
        whole = member.positions.size == graph.shapes[member.parameter][1]
        if member.dim != 1 or not (whole or _reads_in_order(graph, member)):
            return f"'{member.module}' reads other channels as well"
    waiting, seen = list(graph.readers(value)), set()
    while waiting:
        node = waiting.pop()
        if node.index in seen or consumers.intersection(node.parameters):
            continue
        seen.add(node.index)
        if node.read is not None and len(graph.readers(value)) > 1:
            return f"not only the depthwise convolution in {node.module} reads these channels: " + _BY_IMAGES
        if node.op not in _PASSIVE:
            return in_between(node)
        waiting += graph.readers(node.outputs[0])
    return None


def _reads_in_order(graph: Graph, member: Member) -> bool:
    """Return whether what stays of a layer's inputs keeps its order, whichever channels go."""
    cut, own = graph.balanced_groups(), (member.parameter, member.dim)
    groups = {graph.groups[number].name for number in np.unique(graph.group_of[graph.slots[own]]) if number >= 0}
    return cut.isdisjoint(groups)
