"""Parameters and multiply-accumulates (MACs) of a network, in all and per layer.

MACs are those of convolutions, linear layers and matrix products, for one input, as `torch.utils.flop_counter` counts
them (half of its floating-point operations). Norms, activations and pooling count as zero, as papers have it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.surgery.graph.blocks import nodes_left, skipped_blocks
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.labels import Mask
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.tracing.tracer import trace


@dataclass(frozen=True)
class LayerCost:
    """One module with parameters of its own: its type, output channels, parameters and MACs for one input."""

    name: str
    kind: str
    channels: int
    params: int
    macs: int


@dataclass(frozen=True)
class Cost:
    """A network's size. `channels` counts the outputs of all convolutions and linear layers.

    Attributes:
        params: Parameters.
        macs: Multiply-accumulates for one input.
        channels: Output channels of all convolutions and linear layers.
        layers: The same for each layer, where that was asked for.

    Examples:
        >>> import prunekit as pk
        >>> cost = pk.inspect(pk.load("prunekit:resnet20")).cost
        >>> cost.params, cost.macs
        (269722, 40551040)
        >>> cost.layers[0]
        LayerCost(name='conv1', kind='Conv2d', channels=16, params=432, macs=442368)
    """

    params: int
    macs: int
    channels: int
    layers: tuple[LayerCost, ...] = ()

    def to_json(self) -> dict[str, int]:
        """Return the totals."""
        return {"params": self.params, "macs": self.macs, "channels": self.channels}


def measure(model: nn.Module, x: Any) -> Cost:
    """Return the cost of `model` on the example input `x`, per input of the batch; nothing is computed."""
    return cost_of(model, trace(model, x))


def cost_of(model: nn.Module, graph: Graph) -> Cost:
    """Return the cost of the network that `graph` was traced from, layer by layer."""
    macs = _macs_by_module(graph)
    layers = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own or macs.get(name):
            layers.append(
                LayerCost(
                    name=name,
                    kind=type(module).__name__,
                    channels=_outputs(graph, name),
                    params=sum(p.numel() for p in own),
                    macs=macs.get(name, 0),
                )
            )
    total = predict(graph, graph.kept_classes({}))
    params = sum(p.numel() for p in model.parameters())
    return Cost(params, total.macs, total.channels, tuple(layers))


def _macs_by_module(graph: Graph) -> dict[str, int]:
    totals: dict[str, int] = {}
    for node in graph.nodes:
        if node.macs:
            owner = node.parameters[0].rpartition(".")[0] if node.parameters else node.module
            for name in node.parameters:
                if name.endswith("weight"):
                    owner = name.rpartition(".")[0]
            totals[owner] = totals.get(owner, 0) + node.macs // graph.batch
    return totals


def _outputs(graph: Graph, module: str) -> int:
    return next((graph.shapes[n][dim] for n, dim in graph.outputs() if n.rpartition(".")[0] == module), 0)


def predict(graph: Graph, kept: Mask, biases: Collection[str] = ()) -> Cost:
    """Return the cost once only the `kept` classes are left, without building the network. Exact; takes microseconds.

    `biases` names the layers that get a bias on the way. Buffers count as no parameters, the index of a
    `ChannelSelect` among them.
    """
    shares, skipped = graph.sizes(kept), skipped_blocks(graph, kept)
    gone = {name for block in skipped for name in graph.shapes if block.holds(name)}
    params = sum(
        _product(shares.get((name, dim), size) for dim, size in enumerate(shape))
        for name, shape in graph.shapes.items()
        if name in graph.parameters and name not in gone
    )
    params += sum(shares[block.last] for block in skipped)  # the constants that their branches leave
    biases = [name for name in biases if f"{name}.weight" not in gone]
    params += sum(shares.get((weight, 0), graph.shapes[weight][0]) for weight in map("{}.weight".format, set(biases)))
    macs = sum(_node_macs(graph, node, kept, shares) for node in nodes_left(graph, skipped) if node.macs)
    channels = sum(shares[key] for key in graph.outputs() if key[0] not in gone)
    return Cost(params, macs // graph.batch, channels)


def _product(sizes: Any) -> int:
    result = 1
    for size in sizes:
        result *= size
    return int(result)


def _node_macs(graph: Graph, node: Node, kept: Mask, shares: Mapping[tuple[str, int], int]) -> int:
    """Return the MACs left of a node: proportional to each dimension of its weight, or to the heads it computes."""
    macs, heads = node.macs, graph.products.get(node.index)
    if heads is not None:
        macs = macs * int(kept[heads].sum()) // heads.size
    for name in node.parameters:
        shape = graph.shapes[name]
        if len(shape) < 2:
            continue
        for dim, size in enumerate(shape):
            macs = macs * shares.get((name, dim), size) // size
    return macs
