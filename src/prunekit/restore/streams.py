"""Residual streams: a layer that adds into one can make up for the errors that the stream has gathered so far.

What such a layer is asked for is then not its own old output but what brings the *sum* back to the original's: its
output, plus the difference of the two copies' streams, divided by the scale of the batch norm on the way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from prunekit.surgery import Graph
from prunekit.surgery.layer_rules import is_batch_norm
from prunekit.surgery.meta import DispatchMode


@dataclass(frozen=True)
class Join:
    """A layer's output, perhaps through a batch norm, is added in node `sum` to what node `stream` has made earlier."""

    stream: int
    sum: int
    norm: str | None


def find_join(graph: Graph, layer: str) -> Join | None:
    """Where a layer adds into a stream that is there before the layer runs; None where it does not."""
    call = next(node for node in graph.calls(layer) if node.op in ("convolution", "addmm", "mm"))
    value, norm = call.outputs[0], None
    while True:
        readers = graph.readers(value)
        if len(readers) != 1:
            return None
        reader = readers[0]
        if reader.op == "add" and len(set(reader.inputs)) == 2:
            other = next(v for v in reader.inputs if v != value)
            maker = next((node.index for node in graph.nodes if other in node.outputs[:1]), call.index)
            return Join(maker, reader.index, norm) if maker < call.index else None
        if is_batch_norm(reader.op) and norm is None and reader.parameters:
            norm = reader.parameters[0].rpartition(".")[0]
        elif reader.op not in ("view", "_unsafe_view"):
            return None
        value = reader.outputs[0]


class Watch(DispatchMode):
    """Counts the ops of a forward pass along the graph's nodes, and holds what those in `wanted` return.

    Where a pass leaves the recorded path it is lost, and nothing is held from there on. `weighted` are the sums of
    joins that were more than plain ones.
    """

    def __init__(self, graph: Graph, joins: Iterable[Join]) -> None:
        super().__init__()
        self.values: dict[int, Tensor] = {}
        self.weighted: set[int] = set()
        joins = list(joins)
        self._wanted = {join.stream for join in joins}
        self._sums = {join.sum for join in joins}
        self._nodes = graph.nodes
        self._next = 0
        self._lost = self._paused = False

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What runs in here is no part of the forward."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and look at what it was."""
        out = func(*args, **(kwargs or {}))
        if not self._paused and not self._lost:
            self._follow(func, args, kwargs or {}, out)
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        op = str(func._schema.name).removeprefix("aten::").rstrip("_")
        index, node = self._next, self._nodes[self._next] if self._next < len(self._nodes) else None
        if node is None or not (node.op == op or (is_batch_norm(node.op) and is_batch_norm(op))):
            # devices differ in the memory that their ops ask for, and in nothing else
            self._lost = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
            return
        self._next += 1
        if index in self._sums and kwargs.get("alpha", 1) != 1:
            self.weighted.add(index)
        if index in self._wanted:
            self.values[index] = out if isinstance(out, Tensor) else out[0]
