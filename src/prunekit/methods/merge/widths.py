"""The filters that stay in each layer: how many of its units in order, the same share of all layers or by loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prunekit.errors import InputError
from prunekit.methods.budget import Budget, check_budget, fewest, has_budget, read_budget
from prunekit.methods.goal import LatencyGoal
from prunekit.methods.merge.ranked import Ranked
from prunekit.methods.merge.selection import removals
from prunekit.methods.partial import ratios_by_group
from prunekit.methods.ranking import fill_blocks, round_widths
from prunekit.methods.search import Search, steps_by_meter, steps_within
from prunekit.progress import counter
from prunekit.surgery import Cost, Graph, predict
from prunekit.surgery.graph.labels import Mask

if TYPE_CHECKING:
    from prunekit.methods.merge.config import MergeConfig

Kept = dict[str, list[int]]
# The least that widths by a foreseen loss leave of a layer, for readings are not to be trusted all the way: as a share
# of the layer, and of modelled ones as a share of what the same ratio of every layer would leave.
_LEAST_READ, _LEAST_MODELLED = 1 / 8, 1 / 2
_LEAST_COST = 1e-9  # the share of the whole that one unit saves where a clock sees no difference
# By what part savings are counted in MACs, the rest in parameters, where both are limited.
_MIXES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


def choose(
    graph: Graph,
    ranked: Sequence[Ranked],
    config: MergeConfig,
    by_loss: bool,
    further: Callable[[], str | None],
) -> Kept:
    """Return the kept units of every layer that loses some.

    Where widths go `by_loss` that is the least loss within the parameters and MACs that the same ratio of every layer
    would leave; else, and where no losses are known, every layer loses the same share. `further` tells what to do where
    a target is out of reach.

    Raises:
        InputError: a budget that cannot be met, or a layer that cannot be narrowed.
    """
    check_budget(config)
    ratios = ratios_by_group(graph, config, [one.name for one in ranked])
    settled = _rounded(ranked, _by_ratios(ranked, ratios, config), config)
    if not has_budget(config):
        return settled
    ranked = [one for one in ranked if one.name not in ratios]
    if not ranked:
        raise InputError("every layer has a ratio of its own", hint="say how much goes in one way alone")
    budget = read_budget(config, predict(graph, graph.kept_classes({})))
    equally = partial(_uniform, graph, ranked, config, budget, settled)
    if not by_loss or all(one.curve is None for one in ranked):
        return equally(partial(steps_within, further=further))
    uniform = equally(partial(steps_by_meter, further=further))
    start = _descent(ranked, config, uniform)
    if budget.kind == "ratio":
        return _within_both(graph, start, uniform)
    way = start.by(_unit_costs(graph, start.known, lambda kept: budget.spent(graph, kept)))
    try:
        return way.keeps_at(steps_within(graph, budget, len(way.order), way.keeps_at))
    except InputError:  # what loses most stays too wide, and equal shares go further
        return equally(partial(steps_within, further=further))


def shortfall(graph: Graph, kept: Kept, config: MergeConfig) -> str | None:
    """Return what to say where less than half of the asked share of the MACs goes; None elsewhere."""
    if not has_budget(config) or config.only or config.skip or config.ratio_of:  # it is said where it goes
        return None
    whole = predict(graph, graph.kept_classes({}))
    budget = read_budget(config, whole)
    if budget.kind != "ratio":
        return None
    taken = 1 - predict(graph, graph.kept_classes(kept)).macs / max(1, whole.macs)
    if taken >= budget.amount / 2:
        return None
    return f"this takes {taken:.1%} of the MACs, where {budget.amount:.0%} were asked for"


def _uniform(
    graph: Graph, ranked: Sequence[Ranked], config: MergeConfig, budget: Budget, settled: Kept, search: Search
) -> Kept:
    """Return what stays where every ranked layer loses the same share, beside what is `settled` of others."""

    def keeps_at(ratio: float, ahead: int = 0) -> Kept:
        shares = [min(ratio + (number < ahead) / 1000, 0.999) for number in range(len(ranked))]
        kept = {one.name: _largest(one, share, config.min_channels) for one, share in zip(ranked, shares, strict=True)}
        losing = {name: units for name, units in kept.items() if units is not None}
        return {**settled, **_rounded(ranked, losing, config)}

    if budget.kind == "ratio":
        return keeps_at(budget.amount)
    # The share goes up by thousandths. Where time goes in jumps, since kernels work on blocks, one layer goes after
    # the other, the first ones ahead by one step.
    each = 1 if budget.goal is None else len(ranked)

    def keeps_after(step: int) -> Kept:
        return keeps_at((step // each + 1) / 1000, step % each)

    return keeps_after(search(graph, budget, 998 * each, keeps_after))


def _within_both(graph: Graph, start: _Descent, uniform: Kept) -> Kept:
    """Return the widths of the least loss within the parameters and the MACs of equal shares."""
    goal = _cost(graph, uniform)

    def within(kept: Kept) -> bool:
        cost = _cost(graph, kept)
        return cost.params <= goal.params and cost.macs <= goal.macs

    def end(way: _Descent) -> tuple[bool, float, int]:
        count = fewest(len(way.order), lambda count: within(way.keeps_at(count)))
        return not within(way.keeps_at(count)), way.loss(count), count

    params = _unit_costs(graph, start.known, lambda kept: predict(graph, kept).params)
    macs = _unit_costs(graph, start.known, lambda kept: predict(graph, kept).macs)
    # the best is where both limits bind, or one that lets the other be
    ways = [start.by((1 - part) * params + part * macs) for part in _MIXES]
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
    predict and its units cost. `others` is what equal shares leave of the layers of which nothing is known.
    """

    known: Sequence[Ranked]
    others: Kept
    curves: Sequence[NDArray[np.float64]]
    config: MergeConfig
    least: Sequence[int]
    order: Sequence[int] = ()

    def by(self, costs: NDArray[np.float64]) -> _Descent:
        """Return it with the order in which least is lost for what is saved, by the cost of one unit of each layer."""
        return replace(self, order=removals(self.curves, costs.tolist(), self.least))

    def keeps_at(self, count: int) -> Kept:
        """Return what stays after so many steps."""
        left = [(one, one.layer.group.size - int(n)) for one, n in zip(self.known, self._gone(count), strict=True) if n]
        # of a layer that can go there is nothing, or as much as of others
        kept = {one.name: one.best(max(n, self.config.min_channels) if n else 0) for one, n in left}
        return {**_rounded(self.known, kept, self.config), **self.others}

    def loss(self, count: int) -> float:
        """Return what the layers together are predicted to have lost by then."""
        return sum(float(curve[len(curve) - 1 - n]) for curve, n in zip(self.curves, self._gone(count), strict=True))

    def _gone(self, count: int) -> NDArray[np.int64]:
        return np.bincount(np.array(self.order[:count], dtype=np.int64), minlength=len(self.known))


def _descent(ranked: Sequence[Ranked], config: MergeConfig, uniform: Kept) -> _Descent:
    def least(one: Ranked) -> int:
        if one.source == "measured":
            return 0 if one.can_go else config.min_channels
        size = one.layer.group.size
        equal = len(uniform.get(one.name, range(size)))
        share = _LEAST_MODELLED * equal if one.source == "modelled" else min(_LEAST_READ * size, equal)
        return max(config.min_channels, math.ceil(share))

    known = [(one, one.curve) for one in ranked if one.curve is not None]
    layers = [one for one, _ in known]
    others = {name: units for name, units in uniform.items() if name not in {one.name for one in layers}}
    return _Descent(layers, others, [curve for _, curve in known], config, [least(one) for one in layers])


def _unit_costs(graph: Graph, ranked: Sequence[Ranked], spent: Callable[[Mask], float]) -> NDArray[np.float64]:
    """Return the cost of one unit of each layer, as a share of all that is `spent`: `(layers,)`, none of them zero."""
    whole, costs, count = spent(graph.kept_classes({})), [], counter("weighing layers")
    for done, one in enumerate(ranked):
        count(done, len(ranked))
        size = one.layer.group.size
        half = spent(graph.kept_classes({one.name: one.best(max(1, size // 2))}))
        costs.append((whole - half) / whole / max(1, size - size // 2))
    return np.array([max(cost, _LEAST_COST) for cost in costs])


def _by_ratios(ranked: Sequence[Ranked], ratios: Mapping[str, float], config: MergeConfig) -> Kept:
    """Return what stays of each layer that has a ratio of its own."""
    by_name = {one.name: one for one in ranked}
    kept = {}
    for name, ratio in ratios.items():
        if name not in by_name:
            raise InputError(f"channel group '{name}' cannot be merged: see 'left' in prunekit inspect")
        index = _largest(by_name[name], ratio, config.min_channels)
        if index is not None:
            kept[name] = index
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
    groups, goal = [one.layer.group for one in ranked], config.target_latency
    if isinstance(goal, LatencyGoal) and config.round_to == 1:
        return fill_blocks(groups, places, kept, goal.block)
    return round_widths(groups, places, kept, config.round_to)
