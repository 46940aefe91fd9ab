"""Planning of `slim`: gammas to scores, scores to a threshold, a threshold to widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.errors import InputError
from prunekit.methods.base import restoration
from prunekit.methods.budget import Budget, check_ratio, fewest, read_budget
from prunekit.methods.ranking import keep_after, protected_within, removal_order, round_widths
from prunekit.methods.slim import gamma_histogram
from prunekit.methods.streams import with_unread_streams
from prunekit.plan import Keep, Plan
from prunekit.restore.calibration import calibrate
from prunekit.restore.constants import constant_folds
from prunekit.restore.images import Images
from prunekit.restore.plain_layers import possible_biases, weight_of
from prunekit.restore.synthetic import synthesise
from prunekit.surgery import ChannelGroup, Cost, Graph, balanced, predict

if TYPE_CHECKING:
    from prunekit.methods.slim.config import SlimConfig

_REDUCE = {"max": np.fmax, "sum": np.add, "mean": np.add}


def plan_slimming(model: nn.Module, graph: Graph, config: SlimConfig, images: Images | None = None) -> Plan:
    """Return the plan of one pass of Network Slimming; see `Slim.plan`."""
    restore = restoration(config.restore, images, "constants")
    given = {} if restore == "none" else possible_biases(model, graph)
    scores = gamma_scores(model, graph, config.aggregate)
    groups = _prunable(graph, scores, config.scope)
    if isinstance(config.ratio, dict):
        keeps, protected = _by_group(graph, groups, scores, config)
    else:
        keeps, protected = _by_threshold(graph, groups, scores, config, given)
    if not keeps:
        raise InputError("the budget is too small to remove a single channel", hint="ask for more, or lower --round-to")
    constants = None if restore == "none" else constant_folds(model, graph, keeps)
    threshold = _threshold(groups, scores, keeps)
    warning = gamma_histogram.warning(np.concatenate([scores[group.name] for group in groups]), threshold)
    notes = {"restore": restore, "protected": protected, "threshold": threshold, "warning": warning}
    if constants and constants.lost:
        notes["constants_lost"] = dict(constants.lost)
    folds = constants.folds if constants else ()
    plan = Plan([*(Keep(name, index) for name, index in keeps.items()), *folds], notes)
    if restore == "synthetic":
        return synthesise(model, graph).restored(model, graph, plan)
    return calibrate(model, graph, plan, images) if restore == "calibrate" and images is not None else plan


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


def _by_threshold(
    graph: Graph,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, NDArray[np.float64]],
    config: SlimConfig,
    given: Mapping[str, Sequence[str]],
) -> tuple[dict[str, list[int]], list[str]]:
    """Apply one global threshold: remove exactly as many units as the ratio says, or as the target cost needs.

    `given` names, for each group, the layers that may get a bias when it loses units.
    """
    budget = read_budget(config, predict(graph, graph.kept_classes({})))
    removal = removal_order(groups, scores, max(config.min_channels, 1))

    def keeps_at(count: int) -> dict[str, list[int]]:
        widths = round_widths(groups, scores, keep_after(groups, removal, count), config.round_to)
        return with_unread_streams(graph, balanced(graph, widths, scores, config.round_to))

    if budget.kind == "ratio":
        total = sum(len(group.free) for group in groups)
        count = min(round(budget.amount * total), len(removal.order))
    else:
        count = _fewest(budget, len(removal.order), lambda k: _cost(graph, keeps_at(k), given))
    return keeps_at(count), protected_within(groups, scores, removal, count)


def _cost(graph: Graph, keeps: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[str]]) -> Cost:
    """Return the highest possible cost after removal: a constant that turns out to be zero needs no bias."""
    biases = {layer for name in keeps for layer in given.get(name, ())}
    return predict(graph, graph.kept_classes(keeps), biases)


def _fewest(budget: Budget, limit: int, cost_at: Callable[[int], Cost]) -> int:
    """Return the fewest removals that meet the target.

    Raises:
        InputError: Even the removal of everything that can be removed leaves more.
    """
    count = fewest(limit, lambda k: budget.met_by(cost_at(k)))
    reached = cost_at(count)
    if not budget.met_by(reached):
        left = reached.macs if budget.kind == "macs" else reached.params
        raise InputError(
            f"the target of {budget.amount:,.0f} {budget.kind} cannot be met: removing all that may go leaves {left:,}"
        )
    return count


def _by_group(
    graph: Graph, groups: Sequence[ChannelGroup], scores: Mapping[str, NDArray[np.float64]], config: SlimConfig
) -> tuple[dict[str, list[int]], list[str]]:
    """Apply the ratio given for each group by name: remove the lowest units of that group."""
    assert isinstance(config.ratio, dict)
    allowed = {group.name: group for group in groups}
    keeps: dict[str, list[int]] = {}
    protected: list[str] = []
    for name, ratio in config.ratio.items():
        group = graph.group(name)
        if group.name not in allowed:
            raise InputError(f"channel group '{name}' cannot be pruned: {group.reason or 'no batch norm scales it'}")
        removal = removal_order([group], scores, config.min_channels)
        wanted = round(check_ratio(ratio) * len(group.free))
        keeps.update(keep_after([group], removal, min(wanted, len(removal.order))))
        protected += removal.protected if wanted > len(removal.order) else ()
    return balanced(graph, round_widths(groups, scores, keeps, config.round_to), scores, config.round_to), protected


def _threshold(
    groups: Sequence[ChannelGroup], scores: Mapping[str, NDArray[np.float64]], keeps: Mapping[str, Sequence[int]]
) -> float:
    """Return the largest |gamma| that was removed."""
    gone = [
        float(scores[g.name][u]) for g in groups if g.name in keeps for u in set(range(g.size)) - set(keeps[g.name])
    ]
    return max(gone, default=0.0)
