"""A gated network and what has been read from it, once, for all who ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from prunekit.methods.manidp.costs import DynamicCost, dynamic_cost, graph_of
from prunekit.nn.gated import GatedConv, gated_layers
from prunekit.surgery import Graph


@dataclass(frozen=True)
class GatedView:
    """A network with gates, its graph, what an input costs in it, and its gated layers, by name, in order.

    Thresholds may be moved meanwhile, and weights: neither is in the graph or in the cost.
    """

    model: nn.Module
    graph: Graph
    cost: DynamicCost
    layers: Mapping[str, GatedConv]

    @classmethod
    def of(cls, model: nn.Module, graph: Graph | None = None) -> GatedView:
        """Read `model`; `graph` is what `trace` has read from it, if that is at hand.

        Raises:
            InputError: it does not say what it reads.
        """
        graph = graph_of(model) if graph is None else graph
        return cls(model, graph, dynamic_cost(model, graph), dict(gated_layers(model)))
