"""Cost of an input in a gated network: MACs from the channels that its gates keep.

A convolution costs its dense MACs times the kept share of its outputs, where it is gated, times the kept share of its
inputs, where these come from a gated layer through nothing that makes zeros into something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from prunekit import surgery
from prunekit.errors import InputError
from prunekit.nn.gated import gated_layers
from prunekit.spec import origin_of
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.groups import ChannelGroup
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.ops import ZERO_STAYS
from prunekit.surgery.tracing.tracer import example_of

_HALVINGS = 30


@dataclass(frozen=True)
class Term:
    """One layer's dense MACs, and the gated layers (by number) that its outputs and inputs follow, if any."""

    layer: str
    macs: int
    outputs: int | None
    inputs: int | None


@dataclass(frozen=True)
class DynamicCost:
    """The MACs of one input as a function of what its gates keep.

    `layers` names the gated layers in order and `channels` their widths; `gates` are the MACs of the gates themselves.
    """

    layers: tuple[str, ...]
    channels: tuple[int, ...]
    terms: tuple[Term, ...]
    gates: int

    @property
    def dense(self) -> int:
        """The MACs of the network with every channel on, without gates."""
        return sum(term.macs for term in self.terms)

    def macs(self, kept: Tensor) -> Tensor:
        """Return MACs `(N,)` of inputs that keep `kept` channels, `(N, layers)`, gates not counted; float64."""
        shares = kept.cpu().to(torch.float64) / torch.tensor(self.channels, dtype=torch.float64)
        total = shares.new_zeros(len(shares))
        for term in self.terms:
            part = shares.new_full((len(shares),), float(term.macs))
            for layer in (term.outputs, term.inputs):
                if layer is not None:
                    part = part * shares[:, layer]
            total += part
        return total

    @cached_property
    def least(self) -> int:
        """The MACs of an input that keeps nothing."""
        return int(self.macs(torch.zeros(1, len(self.layers)))[0])


def share_for(cost: DynamicCost, macs: float) -> float:
    """Return the share of its channels that each layer keeps, the same in all, where an input costs `macs` of the dense
    network's MACs, both 0 to 1.
    """
    widths, low, high = torch.tensor(cost.channels, dtype=torch.float64), 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if float(cost.macs((widths * middle).unsqueeze(0))) > macs * cost.dense:
            high = middle
        else:
            low = middle
    return high


def graph_of(model: nn.Module) -> Graph:
    """Return the graph of a network on the input that it remembers.

    Raises:
        InputError: it does not say what it reads.
    """
    origin = origin_of(model)
    if origin is None or origin.input is None:
        raise InputError("the network does not say what it reads", hint="add --input-size, such as 3x224x224")
    return surgery.trace(model, example_of(model, (1, *origin.input.shape)), probe=False)


def channels_of(graph: Graph, layer: str) -> ChannelGroup:
    """Return the channel group of a gated layer's outputs, in the graph of the gated network."""
    first = graph.slots[f"{layer}.gate.excite.weight", 0][0]
    return graph.groups[int(graph.group_of[first])]


def dynamic_cost(model: nn.Module, graph: Graph) -> DynamicCost:
    """Read the cost of the gated network that `graph` was traced from."""
    gated = dict(gated_layers(model))
    numbers = {name: number for number, name in enumerate(gated)}
    reader = _Reader(graph, numbers)
    terms, gates = [], 0
    for node in graph.nodes:
        if not node.macs or not node.parameters:
            continue
        owner = next(name for name in node.parameters if name.endswith("weight")).rpartition(".")[0]
        home = next((name for name in gated if owner.startswith(f"{name}.")), None)
        if home is not None and owner.startswith(f"{home}.gate."):
            gates += node.macs // graph.batch
            continue
        inside = home is not None and reader.made_inside(node.inputs[0], home)
        inputs = None if inside else reader.gated_source(node.inputs[0])
        terms.append(Term(owner, node.macs // graph.batch, None if home is None else numbers[home], inputs))
    widths = tuple(layer.gate.excite.out_features for layer in gated.values())
    return DynamicCost(tuple(gated), widths, tuple(terms), gates)


class _Reader:
    """Reader that follows values of a graph backwards."""

    def __init__(self, graph: Graph, numbers: Mapping[str, int]) -> None:
        self._made_by = {value: node for node in graph.nodes for value in node.outputs}
        self._numbers = numbers

    def made_inside(self, value: int, layer: str) -> bool:
        """Return whether a value is made within a gated layer: then the layer's own gate has thinned it already."""
        node = self._made_by.get(value)
        return node is not None and node.module.startswith(f"{layer}.")

    def gated_source(self, value: int) -> int | None:
        """Return the number of the gated layer whose zeros a value has, or None."""
        node = self._made_by.get(value)
        while node is not None:
            if node.op == "mul":
                return self._product(node)
            if node.op not in ZERO_STAYS or not node.inputs:
                return None
            node = self._made_by.get(node.inputs[0])
        return None

    def _product(self, node: Node) -> int | None:
        if node.module in self._numbers and len(node.shape) > 2:
            return self._numbers[node.module]
        found = [self.gated_source(value) for value in node.inputs]
        return next((number for number in found if number is not None), None)
