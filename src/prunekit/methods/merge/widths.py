"""The filters that stay in each layer: an order by some criterion, and how many of it, the same share or by loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.methods.budget import Budget, check_ratio, fewest, fewest_to_meet, read_budget
from prunekit.methods.merge.candidates import Candidate
from prunekit.methods.merge.selection import losses, pivoted, removals
from prunekit.methods.ranking import round_widths
from prunekit.progress import counter
from prunekit.restoration.second_moments import Reading
from prunekit.surgery import Cost, Graph, predict

if TYPE_CHECKING:
    from prunekit.methods.merge.config import MergeConfig

Kept = dict[str, list[int]]
# The least that widths by loss leave of a layer, for readings are not to be trusted all the way: of measured ones as a
# share of the layer, of modelled ones as a share of what the same ratio of every layer would leave.
_LEAST_MEASURED, _LEAST_MODELLED = 1 / 8, 1 / 2
# By what part savings are counted in MACs, the rest in parameters, where both are limited.
_MIXES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Ranked:
    """A layer, its units from the best to the worst, and what it loses with the first `n` of them, if that is known."""

    layer: Candidate
    criterion: str
    order: NDArray[np.int64]
    curve: NDArray[np.float64] | None = None

    @property
    def name(self) -> str:
        """The group's name."""
        return self.layer.group.name

    def best(self, number: int) -> list[int]:
        """Return the best units, ascending."""
        return sorted(int(unit) for unit in self.order[:number])


def rank(
    layers: Sequence[Candidate], criterion: str | None, usual: str, readings: Mapping[str, Reading]
) -> list[Ranked]:
    """Return each layer's units by the criterion; by `l2-norm` where `pivot` has no reading of them.

    Where `criterion` is None it is the `usual` one, and `pivot` for layers that read what a norm hands on.
    """
    ranked, count = list[Ranked](), counter("ranking filters")
    for done, layer in enumerate(layers):
        count(done, len(layers))
        reading = readings.get(layer.group.name)
        own = criterion or ("pivot" if reading is not None and reading.in_front else usual)
        if own == "pivot" and reading is not None:
            ranked.append(Ranked(layer, own, *pivoted(reading)))
        else:
            own = "l2-norm" if own == "pivot" else own
            ranked.append(Ranked(layer, own, np.argsort(-importance(layer.weight, own), kind="stable")))
    return ranked


def importance(weight: Tensor, criterion: str) -> NDArray[np.float64]:
    """Return a score for each filter, `(C,)`: `l1-norm`, `l2-norm`, or `l2-GM`, the sum of distances to all filters."""
    flat = weight.flatten(1).double().cpu()
    if criterion == "l2-GM":
        scores = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
    else:
        scores = flat.norm(p=1 if criterion == "l1-norm" else 2, dim=1)
    result: NDArray[np.float64] = scores.numpy()
    return result


def choose(
    graph: Graph,
    ranked: Sequence[Ranked],
    config: MergeConfig,
    readings: Mapping[str, Reading],
    further: Callable[[], str | None],
) -> Kept:
    """Return the kept units of every layer that loses some.

    With `readings`, widths follow the loss that they predict, within the parameters and MACs that the same ratio of
    every layer would leave; without, every layer loses the same share. `further` tells what to do where a target is
    out of reach.

    Raises:
        InputError: a budget that cannot be met, or a layer that cannot be narrowed.
    """
    if isinstance(config.ratio, dict):
        return _rounded(ranked, _by_group(graph, ranked, config), config)
    budget = read_budget(config, predict(graph, graph.kept_classes({})))
    uniform = _uniform(graph, ranked, config, budget, further)
    return _by_loss(graph, ranked, config, budget, readings, uniform) if readings else uniform


def shortfall(graph: Graph, kept: Kept, config: MergeConfig) -> str | None:
    """Return what to say where less than half of the asked share of the MACs goes; None elsewhere."""
    whole = predict(graph, graph.kept_classes({}))
    budget = None if isinstance(config.ratio, dict) else read_budget(config, whole)
    if budget is None or budget.kind != "ratio":
        return None
    taken = 1 - predict(graph, graph.kept_classes(kept)).macs / max(1, whole.macs)
    if taken >= budget.amount / 2:
        return None
    return f"this takes {taken:.1%} of the MACs, where {budget.amount:.0%} were asked for"


def _uniform(
    graph: Graph, ranked: Sequence[Ranked], config: MergeConfig, budget: Budget, further: Callable[[], str | None]
) -> Kept:
    def keeps_at(ratio: float) -> Kept:
        kept = {one.name: _largest(one, ratio, config.min_channels) for one in ranked}
        return _rounded(ranked, {name: units for name, units in kept.items() if units is not None}, config)

    if budget.kind == "ratio":
        return keeps_at(budget.amount)
    steps = fewest_to_meet(budget, 998, lambda k: _cost(graph, keeps_at((k + 1) / 1000)), further)
    return keeps_at((steps + 1) / 1000)


def _by_loss(
    graph: Graph,
    ranked: Sequence[Ranked],
    config: MergeConfig,
    budget: Budget,
    readings: Mapping[str, Reading],
    uniform: Kept,
) -> Kept:
    start = _descent(graph, ranked, config, readings, uniform)
    if budget.kind != "ratio":
        way = start.by(float(budget.kind == "macs"))
        kept = way.keeps_at(fewest(len(way.order), lambda k: budget.met_by(_cost(graph, way.keeps_at(k)))))
        return kept if budget.met_by(_cost(graph, kept)) else uniform
    goal = _cost(graph, uniform)

    def within(kept: Kept) -> bool:
        cost = _cost(graph, kept)
        return cost.params <= goal.params and cost.macs <= goal.macs

    def end(way: _Descent) -> tuple[bool, float, int]:
        count = fewest(len(way.order), lambda count: within(way.keeps_at(count)))
        return not within(way.keeps_at(count)), way.loss(count), count

    ways = [start.by(part) for part in _MIXES]  # the best is where both limits bind, or one that lets the other be
    ends, count = [], counter("choosing widths")
    for done, way in enumerate(ways):
        count(done, len(ways))
        ends.append(end(way))
    best = ends.index(min(ends))
    return ways[best].keeps_at(ends[best][-1])


def _cost(graph: Graph, kept: Kept) -> Cost:
    return predict(graph, graph.kept_classes(kept))


@dataclass(frozen=True)
class _Descent:
    """Layers that lose one unit after the other. `order` names the layer of `known` that does, by what its `curves`
    predict and its units cost in parameters and MACs, `costs[0]` and `costs[1]`. `others` is what equal shares leave of
    the layers of which nothing is known.
    """

    known: Sequence[Ranked]
    others: Kept
    curves: Sequence[NDArray[np.float64]]
    costs: NDArray[np.float64]
    config: MergeConfig
    least: Sequence[int]
    order: Sequence[int] = ()

    def by(self, part: float) -> _Descent:
        """Return it with the order in which least is lost for what is saved: `part` of it counted in MACs, the rest in
        parameters.
        """
        costs = ((1 - part) * self.costs[0] + part * self.costs[1]).tolist()
        return replace(self, order=removals(self.curves, costs, self.least))

    def keeps_at(self, count: int) -> Kept:
        """Return what stays after so many steps."""
        gone = zip(self.known, self._gone(count), strict=True)
        kept = {one.name: one.best(one.layer.group.size - int(n)) for one, n in gone if n}
        return {**_rounded(self.known, kept, self.config), **self.others}

    def loss(self, count: int) -> float:
        """Return what the layers together are predicted to have lost by then."""
        return sum(float(curve[len(curve) - 1 - n]) for curve, n in zip(self.curves, self._gone(count), strict=True))

    def _gone(self, count: int) -> NDArray[np.int64]:
        return np.bincount(np.array(self.order[:count], dtype=np.int64), minlength=len(self.known))


def _descent(
    graph: Graph, ranked: Sequence[Ranked], config: MergeConfig, readings: Mapping[str, Reading], uniform: Kept
) -> _Descent:
    def least(one: Ranked) -> int:
        size = one.layer.group.size
        equal = len(uniform.get(one.name, range(size)))
        share = _LEAST_MODELLED * equal if readings[one.name].modelled else min(_LEAST_MEASURED * size, equal)
        return max(config.min_channels, math.ceil(share))

    known = [one for one in ranked if one.name in readings]
    curves = [losses(readings[one.name], one.order) if one.curve is None else one.curve for one in known]
    others = {name: units for name, units in uniform.items() if name not in readings}
    return _Descent(known, others, curves, _unit_costs(graph, known), config, [least(one) for one in known])


def _unit_costs(graph: Graph, ranked: Sequence[Ranked]) -> NDArray[np.float64]:
    """Return the cost of one unit of each layer, as a share of all parameters and of all MACs: `(2, layers)`."""
    whole, costs, count = predict(graph, graph.kept_classes({})), [], counter("weighing layers")
    for done, one in enumerate(ranked):
        count(done, len(ranked))
        size = one.layer.group.size
        half = predict(graph, graph.kept_classes({one.name: one.best(max(1, size // 2))}))
        saved = np.array([(whole.params - half.params) / whole.params, (whole.macs - half.macs) / whole.macs])
        costs.append(saved / max(1, size - size // 2))
    return np.stack(costs, 1)


def _by_group(graph: Graph, ranked: Sequence[Ranked], config: MergeConfig) -> Kept:
    assert isinstance(config.ratio, dict)
    by_name = {one.name: one for one in ranked}
    kept = {}
    for name, ratio in config.ratio.items():
        group = graph.group(name)
        if group.name not in by_name:
            raise InputError(f"channel group '{name}' cannot be merged: see 'left' in prunekit inspect")
        index = _largest(by_name[group.name], check_ratio(ratio), config.min_channels)
        if index is not None:
            kept[group.name] = index
    return kept


def _largest(one: Ranked, ratio: float, least: int) -> list[int] | None:
    """Return the filters that stay, ascending. The paper truncates the number for convolutions, else rounds it."""
    size = one.layer.group.size
    wanted = size * (1 - ratio)
    number = max(least, 1, round(wanted) if isinstance(one.layer.module, nn.Linear) else int(wanted))
    return None if number >= size else one.best(number)


def _rounded(ranked: Sequence[Ranked], kept: Mapping[str, Sequence[int]], config: MergeConfig) -> Kept:
    places = {one.name: np.empty(len(one.order)) for one in ranked}
    for one in ranked:
        places[one.name][one.order] = -np.arange(len(one.order), dtype=np.float64)
    return round_widths([one.layer.group for one in ranked], places, kept, config.round_to)
