"""Plan of narrower heads: bases in which the first coordinates matter most, and how many of them stay.

Queries and keys meet in the scores, values and the output projection in what a head writes: both are products of two
projections, which stay what they are in any basis of the head (see `low_rank.py`). What a softmax does not see, a part
of the scores that is the same for all keys, does not count. What values have in common at all positions passes through
the weights of attention as it is, so that the output projection's bias makes up for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.methods.narrow_heads.low_rank import joint_basis
from prunekit.methods.narrow_heads.projections import Projection, Projections
from prunekit.methods.scoring import plan_by_scores
from prunekit.plan import Plan, Refit
from prunekit.surgery import Graph, ResolvedPlan, resolve
from prunekit.surgery.graph.inside import HeadWidth
from prunekit.surgery.graph.labels import Ids

_KINDS = {"all": {"queries", "keys", "values"}, "qk": {"queries", "keys"}, "v": {"values"}}


def plan_narrowing(model: nn.Module, graph: Graph, config: Any) -> Plan:
    """Return the plan: the coordinates that stay, and the projections in the new bases.

    Raises:
        InputError: No head can become narrower, or a budget that cannot be met.
    """
    projections = Projections(model, graph)
    turned = {width.name: _Turned(projections, width) for width in _chosen(graph, config.parts)}
    plan = plan_by_scores(graph, {name: one.shares.numpy() for name, one in turned.items()}, config)
    resolved = resolve(graph, plan)
    losing = [one for name, one in turned.items() if name in resolved.keeps]
    return Plan([*plan.operations, *_refits(projections, resolved, losing)], {**plan.notes, "parts": config.parts})


def _chosen(graph: Graph, parts: str) -> list[HeadWidth]:
    every = graph.inside.widths if graph.inside else ()
    found = [width for width in every if _KINDS[parts] >= set(width.sides)]
    if not found and every:
        raise InputError(
            f"the heads' {parts} have no width of their own here",
            hint="--parts all narrows queries, keys and values alike",
        )
    if not found:
        why = next((f"'{name}': {reason}" for name, reason in graph.rigid.items()), "it has none whose heads can go")
        raise InputError(f"no heads of attention in this model can become narrower: {why}")
    return found


class _Turned:
    """The projections of one width in the bases of their products, and what share of these each coordinate makes up."""

    def __init__(self, projections: Projections, width: HeadWidth) -> None:
        self.new: list[tuple[Projection, Tensor]] = []  # what turns, and the matrix that turns it
        # of values, by class: the bias that takes over, what they give to it in all, and what each turned one gives
        self.common: list[tuple[Ids, str, Tensor, Tensor]] = []
        self._all = projections
        shares = [torch.stack(list(turn(width))).mean(0) for turn in self._turns(width)]
        self.shares = torch.stack(shares).sum(0)

    def _turns(self, width: HeadWidth) -> list[Any]:
        return [turn for side, turn in (("queries", self._scores), ("values", self._values)) if side in width.sides]

    def _scores(self, width: HeadWidth) -> Iterator[Tensor]:
        """Turn queries and keys, of all heads that share keys at once."""
        queries, keys = width.sides["queries"], width.sides["keys"]
        for shared in np.unique(keys, axis=0):
            several = [self._all.making(row) for row in queries[(keys == shared).all(axis=1)]]
            key = self._all.making(shared)
            turns, turn, values = joint_basis(
                torch.stack([one.gram(common=True) for one in several]), key.gram(common=False)
            )
            self.new += [*zip(several, turns, strict=True), (key, turn)]
            yield _shares(values)

    def _values(self, width: HeadWidth) -> Iterator[Tensor]:
        """Turn values, and the columns of the output projection that read them."""
        for row in width.sides["values"]:
            value, readers = self._all.making(row), self._all.reading(row)
            bias = readers[0].bias_of_reader
            read = torch.stack([one.gram(common=False) for one in readers]).sum(0)
            turns, turn, values = joint_basis(read.unsqueeze(0), value.gram(common=bias is None))
            self.new += [(value, turn), *((one, turns[0]) for one in readers)]
            if bias is not None:
                rows = torch.stack([one.rows for one in readers]).sum(0)
                each = (turn @ value.constant).unsqueeze(1) * (turns[0] @ rows)
                self.common.append((row, bias, value.constant @ rows, each))
            yield _shares(values)


def _shares(values: Tensor) -> Tensor:
    """Return what share of a product each coordinate makes up, by squared error."""
    return values.square() / values.square().sum().clamp(min=1e-300)


def _refits(projections: Projections, resolved: ResolvedPlan, losing: list[_Turned]) -> Iterator[Refit]:
    """Yield the new values of all that has turned, as it is left."""
    new: dict[str, Tensor] = {}
    for one in losing:
        for projection, turn in one.new:
            projection.write(new, turn)
        for row, bias, wanted, each in one.common:
            projections.full(new, bias).add_(wanted - each[torch.from_numpy(resolved.kept[row])].sum(0))
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, values in new.items():
        for dim in range(values.dim()):
            index = resolved.indices.get((name, dim))
            values = values if index is None else values.index_select(dim, torch.from_numpy(index))
        layer, _, leaf = name.rpartition(".")
        by_layer.setdefault(layer, {})[leaf] = values.to(projections.given[name])
    return (Refit(layer, values) for layer, values in by_layer.items())
