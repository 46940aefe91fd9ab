"""Tensors that take over the constants of a layer's removed inputs: what the traced operations add to their results.

A constant on an input shifts every output by the same amount, wherever the whole kernel counts. The tensor that takes
the shift over must be one that the recorded operations are seen to read: the bias among their own arguments, that of a
module whose own forward runs them, or the running mean of the batch norm that alone reads what they give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from prunekit.surgery.copying import named_tensors
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.recording import Node, WeightRead
from prunekit.surgery.ops import VIEWS

_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True)
class Carriers:
    """The tensors that take a shift of a layer's outputs over, by name, and the sign with which they do.

    A name that the network does not have is a bias to be made. `reason` says why there are none; `read` is how the
    layer reads, where that is known.
    """

    targets: Mapping[str, float]
    read: WeightRead
    reason: str | None = None


class CarrierFinder:
    """Finder of the tensors that can take over constants in a network; `graph` is what `trace` read from `model`."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._graph = graph
        self._modules = dict(model.named_modules())
        self._tensors = named_tensors(model)

    def of(self, weight: str, dim: int) -> Carriers:
        """Return the tensors that take over constants on inputs read through dimension `dim` of parameter `weight`."""
        nodes = [node for node in self._graph.reads(weight) if node.read is not None and node.read.dim == dim]
        read = nodes[0].read if nodes and nodes[0].read is not None else WeightRead(weight, dim)
        reason = _obstacle(nodes)
        if reason is not None:
            return Carriers({}, read, reason)
        present = [self._bias(node, nodes) for node in nodes]
        if None not in present:
            return Carriers({name: 1.0 for name in present if name}, read)
        mean = self._running_mean(nodes)  # serves all of them, so that none may use its bias besides
        if mean is not None:
            return Carriers({mean: -1.0}, read)
        targets: dict[str, float] = {}
        for node, name in zip(nodes, present, strict=True):
            if name is None and not self._lacks_bias(node):
                return Carriers({}, read, f"'{node.op}' in {node.module} reads no bias that is its own")
            targets[name or f"{node.module}.bias"] = 1.0
        return Carriers(targets, read)

    def _bias(self, node: Node, nodes: Sequence[Node]) -> str | None:
        """Return the bias that one operation adds, if it has one that serves `nodes` alone."""
        assert node.read is not None
        if node.read.bias is not None:
            return node.read.bias if self._alone(node.read.bias, nodes) else None
        added = None if node.read.computed else self._added(node)
        return added if added is not None and self._added_to(added, nodes) else None

    def _alone(self, tensor: str, nodes: Sequence[Node]) -> bool:
        """Return whether no other operation computes with `tensor`."""
        ours = {node.index for node in nodes}
        return all(node.index in ours for node in self._graph.uses(tensor))

    def _added(self, node: Node) -> str | None:
        """Return the parameter that alone is added to what `node` gives: matrix products leave their bias to `add`."""
        assert node.read is not None
        last = self._next(node)
        if last is None or last.op != "add" or len(last.parameters) != 1 or len(last.inputs) != 1:
            return None
        bias, outputs = last.parameters[0], self._graph.slots.get((node.read.parameter, 1 - node.read.dim))
        along = [classes for (name, _), classes in self._graph.slots.items() if name == bias]
        fits = outputs is not None and len(along) == 1 and np.array_equal(along[0], outputs)
        return bias if fits and bias in self._graph.parameters else None

    def _next(self, node: Node) -> Node | None:
        """Return the node that alone reads the result of `node`, views of it apart."""
        while True:
            value = node.outputs[0]
            readers = self._graph.readers(value)
            if len(readers) != 1 or value in self._graph.returned:
                return None
            node = readers[0]
            if node.op not in VIEWS:
                return node

    def _added_to(self, bias: str, nodes: Sequence[Node]) -> bool:
        """Return whether `bias` is added to what `nodes` give, and to nothing else."""
        sums = {last.index for node in nodes if (last := self._next(node)) is not None}
        return all(node.index in sums for node in self._graph.uses(bias))

    def _running_mean(self, nodes: Sequence[Node]) -> str | None:
        """Return the running mean of the batch norm that alone reads what `nodes` give, and reads nothing else."""
        norm = self._graph.norm_behind(nodes)
        if norm is None or len(norm.parameters) < 2 or norm.parameters[-2] in self._graph.parameters:
            return None
        mean = norm.parameters[-2]  # the arguments end with the running mean and variance
        given = {node.outputs[0] for node in nodes}
        served = all(not given.isdisjoint(node.inputs) for node in self._graph.uses(mean))
        return mean if served else None

    def _lacks_bias(self, node: Node) -> bool:
        """Return whether `node` is run by the unmodified forward of a layer of PyTorch's own that has no bias."""
        assert node.read is not None
        module = self._modules.get(node.module)
        if node.read.bias is not None or node.read.computed or self._added(node) is not None:
            return False
        if module is None or "forward" in vars(module):
            return False
        if "bias" not in module._parameters or module._parameters["bias"] is not None:
            return False
        if self._tensors[node.read.parameter] is not module._parameters.get("weight"):
            return False
        kind = next((layer for layer in _LAYERS if isinstance(module, layer)), None)
        return kind is not None and all(
            getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward")
        )


def _obstacle(nodes: Sequence[Node]) -> str | None:
    """Return the reason why the operations do not shift outputs evenly, or None."""
    if not nodes:
        return "it does not run on the example input"
    layouts = {(node.read.transposed, node.read.groups, bool(node.read.stride)) for node in nodes if node.read}
    if len(layouts) > 1:
        return "its weight is used in several ways"
    if any(node.read.transposed and max(node.read.stride) > 1 for node in nodes if node.read):
        return "a strided transposed convolution gives a constant another weight at each place"
    return None
