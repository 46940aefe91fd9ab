"""Residual streams: a layer that adds into one can make up for the errors that the stream has gathered so far.

What such a layer is asked for is then not its own old output but what brings the *sum* back to the original's: its
output, plus the difference of the two copies' streams, divided by the scale of the batch norm on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from prunekit.restoration.plain_layers import is_plain_norm, reads, weight_of
from prunekit.restoration.samples import LayerCall
from prunekit.surgery import Graph
from prunekit.surgery.execution.dispatch import DispatchMode, op_name
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.ops import LAYER_OPS, RESHAPES, is_batch_norm

_FAINT = 1e-3  # a channel that a norm scales by less than this part of its strongest one cannot make up for anything


@dataclass(frozen=True)
class Join:
    """A layer's output, perhaps through a batch norm, is added in node `sum` to what node `stream` has made earlier."""

    stream: int
    sum: int
    norm: str | None


def find_join(model: nn.Module, graph: Graph, layer: str) -> Join | None:
    """Return where a layer adds into a stream that is there before the layer runs; None where it does not."""
    call = reads(graph, layer)[0]
    value, norm = call.outputs[0], None
    while True:
        readers = graph.readers(value)
        if len(readers) != 1:
            return None
        reader = readers[0]
        if reader.op == "add" and len(set(reader.inputs)) == 2 and reader.settings.get("alpha", 1) == 1:
            stream = next(v for v in reader.inputs if v != value)
            maker = graph.maker(stream)
            plain = maker is not None and maker.outputs[0] == stream and maker.index < call.index
            return Join(maker.index, reader.index, norm) if maker is not None and plain else None
        if is_batch_norm(reader.op) and norm is None and reader.parameters:
            norm = private_norm(model, graph, reader.parameters[0].rpartition(".")[0])
            if norm is None:
                return None
        elif reader.op not in RESHAPES:
            return None
        value = reader.outputs[0]


def private_norm(model: nn.Module, graph: Graph, norm: str) -> str | None:
    """Return the batch norm, if it has running statistics and channels of its own, not a stream's selection."""
    selecting = any(link.norm == norm for link in graph.links)
    return None if selecting or not is_plain_norm(model, graph, norm) else norm


def scale_of(model: nn.Module, name: str | None) -> Tensor:
    """Return each channel's factor in a batch norm, `(C,)`, one without; infinite where that is next to nothing."""
    if name is None:
        return torch.ones(1, device=next(model.parameters()).device)
    norm: Any = model.get_submodule(name)
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    return torch.where(scale.abs() > _FAINT * scale.abs().max(), scale, torch.inf)


class Watch(DispatchMode):
    """Follower of a forward pass along nodes of a graph: holds the streams that layers add into, and meets layers.

    A layer is met where an op reads its weight, whatever has called it. Where a pass leaves the recorded path it is
    lost, and no stream is held from there on.
    """

    def __init__(
        self, model: nn.Module, nodes: Sequence[Node], layers: Iterable[str], joins: Iterable[Join | None]
    ) -> None:
        super().__init__()
        self._readers = Counter(join.stream for join in joins if join is not None)
        self._streams: dict[int, Tensor] = {}
        self._nodes = nodes
        self._next = 0
        self._lost = False
        self._layers = cast(Any, WeakIdKeyDictionary())
        for name in layers:
            self._layers[model.get_parameter(weight_of(name))] = name

    def take(self, join: Join | None) -> Tensor | None:
        """Return the stream of a join, once for each layer that joins it; None where it was not seen."""
        if join is None or join.stream not in self._streams:
            return None
        self._readers[join.stream] -= 1
        return self._streams[join.stream] if self._readers[join.stream] else self._streams.pop(join.stream)

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op."""
        return func(*args, **kwargs)

    def before(self, layer: str, call: LayerCall) -> None:
        """Handle a layer that is about to run."""

    def after(self, layer: str, call: LayerCall, output: Tensor) -> None:
        """Handle a layer that has run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and look at what it is."""
        kwargs, op = kwargs or {}, op_name(func)
        layer = self._layer(args[2 if op == "addmm" else 1]) if op in LAYER_OPS else None
        call = None if layer is None else LayerCall.of(op, args)
        if layer is not None and call is not None:
            self.before(layer, call)
        out = self.compute(func, args, kwargs)
        if func.is_view and isinstance(out, Tensor):
            name = self._layer(args[0])
            if name is not None:
                self._layers[out] = name
        if not self._lost:
            self._follow(op, (args, kwargs), out)
        if layer is not None and call is not None:
            self.after(layer, call, out)
        return out

    def _layer(self, weight: Any) -> str | None:
        """Return the layer whose weight, or view of it, that is."""
        found: str | None = self._layers.get(weight) if isinstance(weight, Tensor) else None
        return found

    def _follow(self, op: str, given: Any, out: Any) -> None:
        node = self._nodes[self._next] if self._next < len(self._nodes) else None
        if node is None or not (node.op == op or (is_batch_norm(node.op) and is_batch_norm(op))):
            # more than was recorded: what surgery put in (a selection, a block's constant), or memory for a device
            tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
            constant = op in RESHAPES and isinstance(tensors[0], nn.Parameter)
            known = op == "index_select" or constant or not tensors
            self._lost = not known
            return
        self._next += 1
        if node.index in self._readers:
            self._streams[node.index] = out if isinstance(out, Tensor) else out[0]
