"""Choosing channels where parts of a network must keep equally many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prunekit.surgery.graph.balance import Balance, Balancer
from prunekit.surgery.graph.graph import Graph


def balanced(
    graph: Graph, keeps: Mapping[str, Sequence[int]], scores: Mapping[str, NDArray[np.float64]], unit: int = 1
) -> dict[str, list[int]]:
    """Return `keeps` with groups that must keep equal shares brought to the nearest one, the highest scores staying.

    Groups without scores are cut from the end. Widths are multiples of `unit` where the network allows it.
    """
    result = {name: list(index) for name, index in keeps.items()}
    if graph.balancer is None:
        return result
    shares = tuple(_nearest_share(graph, balance, result, unit) for balance in graph.balancer.balances)
    while not (quotas := graph.balancer.quotas(shares)):
        shares = tuple(min(share + 1, most) for share, most in zip(shares, graph.balancer.full, strict=True))
    for balance, share in zip(graph.balancer.balances, shares, strict=True):
        for number in balance.groups:
            group = graph.groups[number]
            result.pop(group.name, None)
            if share < balance.steps:
                score = scores.get(group.name, -np.arange(group.size, dtype=np.float64))
                result[group.name] = _best(graph, graph.balancer, number, score, quotas)
    return result


def _nearest_share(graph: Graph, balance: Balance, keeps: Mapping[str, Sequence[int]], unit: int) -> int:
    groups = [graph.groups[g] for g in balance.groups]
    kept = sum(len(keeps.get(group.name, range(group.size))) for group in groups) / sum(group.size for group in groups)
    if kept == 1:
        return balance.steps
    step = min(unit // math.gcd(unit, groups[0].size // balance.steps), balance.steps)
    return min(max(1, round(kept * balance.steps / step)) * step, balance.steps)


def _best(
    graph: Graph, balancer: Balancer, number: int, score: NDArray[np.float64], quotas: Mapping[int, int]
) -> list[int]:
    """Return the best units of each kind of channel, as many as the quotas say."""
    classes = graph.classes_in(number)
    kinds, units = balancer.kind_of(classes), graph.unit_of[classes]
    kept: list[int] = []
    for kind in np.unique(kinds):
        own = units[kinds == kind]
        kept += own[np.argsort(-score[own], kind="stable")][: quotas.get(int(kind), 0)].tolist()
    return sorted(kept)
