"""A model of a network's time: the times of its layers from the table, and the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunekit.evaluation.timing.layers import Layer, LayerShape, layers_of
from prunekit.surgery import Graph
from prunekit.surgery.graph.blocks import skipped_blocks
from prunekit.surgery.graph.labels import Mask
from prunekit.surgery.ops import VIEWS

REST = "the rest"  # norms, activations, pooling, memory, and what the runtime itself takes


@dataclass(frozen=True)
class LatencyModel:
    """A network's time at any widths, in milliseconds.

    `rest` is what the whole network took beyond its layers. `fixed` of it, the cost of calls, stays whatever the
    widths; what is beyond that goes by the numbers that layers give out, which norms, activations and memory pass on.
    """

    layers: tuple[Layer, ...]
    times: Callable[[LayerShape, int, int], float]
    rest: float
    fixed: float

    @classmethod
    def of(
        cls, graph: Graph, times: Callable[[LayerShape, int, int], float], whole: float, overhead: float, per_call: bool
    ) -> LatencyModel:
        """Return the model of a network that took `whole` milliseconds.

        `overhead` is what a call of the runtime costs, which is paid once, or `per_call` for each operation.
        """
        layers = tuple(layers_of(graph))
        rest = whole - sum(times(one.shape, one.shape.inputs, one.shape.outputs) for one in layers)
        calls = sum(node.op not in VIEWS for node in graph.nodes) - len(layers) if per_call else 1
        return cls(layers, times, rest, min(rest, calls * overhead))

    def parts(self, graph: Graph, kept: Mask) -> dict[str, float]:
        """Return the milliseconds of each layer, and of the rest, with the `kept` classes alone."""
        sizes, parts, skipped = graph.sizes(kept), dict[str, float](), skipped_blocks(graph, kept)
        left = whole = 0
        for one in self.layers:
            whole += one.shape.elements(one.shape.outputs)
            if any(block.holds(one.weight) for block in skipped):
                continue
            inputs, outputs = one.widths(sizes)
            parts[one.name] = parts.get(one.name, 0.0) + self.times(one.shape, inputs, outputs)
            left += one.shape.elements(outputs)
        return {**parts, REST: self.fixed + (self.rest - self.fixed) * left / max(1, whole)}

    def milliseconds(self, graph: Graph, kept: Mask) -> float:
        """Return the time of the whole with the `kept` classes alone."""
        return sum(self.parts(graph, kept).values())
