"""Planning of `slim`: gammas to scores, scores to a threshold, a threshold to widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.errors import InputError
from prunekit.methods.scoring import lowest_removed
from prunekit.methods.slim import gamma_histogram
from prunekit.plan import Keep, Plan
from prunekit.restoration import registry
from prunekit.restoration.base import Evidence
from prunekit.restoration.guarded import restored
from prunekit.restoration.images import Images
from prunekit.restoration.plain_layers import possible_biases, weight_of
from prunekit.restoration.ways import Constants, Nothing
from prunekit.surgery import ChannelGroup, Graph

if TYPE_CHECKING:
    from prunekit.methods.slim.config import SlimConfig

_REDUCE = {"max": np.fmax, "sum": np.add, "mean": np.add}


def plan_slimming(model: nn.Module, graph: Graph, config: SlimConfig, images: Images | None = None) -> Plan:
    """Return the plan of one pass of Network Slimming; see `Slim.plan`."""
    way = registry.chosen(config.restore, Constants.name, images=images is not None, config=config)
    given = {} if isinstance(way, Nothing) else possible_biases(model, graph)
    scores = gamma_scores(model, graph, config.aggregate)
    groups = _prunable(graph, scores, config.scope)
    kept = lowest_removed(graph, groups, scores, config, given)
    keeps = kept.units
    threshold = _threshold(groups, scores, keeps)
    warning = gamma_histogram.warning(np.concatenate([scores[group.name] for group in groups]), threshold)
    notes = {"protected": list(kept.protected), "threshold": threshold, "warning": warning}
    plan = Plan([Keep(name, index) for name, index in keeps.items()], notes)
    if not isinstance(way, Nothing | Constants):  # whatever way is taken, what is constant is no loss
        plan = restored(model, graph, plan, Constants(), Evidence(model, None))
    return restored(model, graph, plan, way, way.evidence(model, graph, images))


def gamma_scores(model: nn.Module, graph: Graph, aggregate: str) -> dict[str, NDArray[np.float64]]:
    """Return |gamma| of each unit, aggregated over the batch norms of its channels; infinite where there is none.

    Returns:
        One array `(group size,)` for each group that has a batch norm.

    Raises:
        InputError: The model has no batch norm with a scale.
    """
    norms = {
        weight_of(name): m.weight
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.weight is not None
    }
    if not norms:
        raise InputError(
            "the model has no batch norm with a scale (gamma), which Network Slimming ranks channels by",
            hint="use 'prunekit merge', which ranks by the weights themselves",
        )
    scores = {}
    for group in graph.groups:
        total = np.full(group.size, np.nan)
        number = np.zeros(group.size)
        for member in (*group.producers, *group.followers):
            if member.parameter in norms:
                gamma = norms[member.parameter].detach().double().abs().cpu().numpy()[member.positions]
                for position, unit in enumerate(member.units):
                    old = total[unit]
                    total[unit] = gamma[position] if np.isnan(old) else _REDUCE[aggregate](old, gamma[position])
                np.add.at(number, member.units, 1)
        if aggregate == "mean":
            total = total / np.maximum(number, 1)
        if number.any():
            scores[group.name] = np.where(np.isnan(total), np.inf, total)
    return scores


def _prunable(graph: Graph, scores: Mapping[str, object], scope: str) -> list[ChannelGroup]:
    groups = [g for g in graph.groups if g.free and g.name in scores and (scope == "all" or not graph.is_stream(g))]
    if not groups:
        reasons = sorted({g.reason for g in graph.groups if g.reason}) or ["no channels scaled by a batch norm"]
        raise InputError(
            f"nothing in this model can be pruned: {reasons[0]}", hint="prunekit inspect lists the reasons"
        )
    return groups


def _threshold(
    groups: Sequence[ChannelGroup], scores: Mapping[str, NDArray[np.float64]], keeps: Mapping[str, Sequence[int]]
) -> float:
    """Return the largest |gamma| that was removed."""
    gone = [
        float(scores[g.name][u]) for g in groups if g.name in keeps for u in set(range(g.size)) - set(keeps[g.name])
    ]
    return max(gone, default=0.0)
