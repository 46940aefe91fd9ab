"""From a score for each channel to a plan that meets the budget: all that many methods need to say is the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunekit.errors import InputError
from prunekit.methods.base import Config
from prunekit.methods.budget import check_budget, has_budget, read_budget
from prunekit.methods.partial import ratios_by_group
from prunekit.methods.ranking import Scores, fill_blocks, keep_after, protected_within, removal_order, round_widths
from prunekit.methods.search import steps_within
from prunekit.methods.streams import with_unread_streams
from prunekit.plan import Keep, Plan
from prunekit.surgery import ChannelGroup, Graph, balanced, predict


@dataclass(frozen=True)
class Kept:
    """The units that stay, by group, and the layers that were protected from losing all they have."""

    units: Mapping[str, Sequence[int]]
    protected: tuple[str, ...]


def plan_by_scores(graph: Graph, scores: Scores, config: Config) -> Plan:
    """Remove the channels with the lowest scores, as many as the settings of a method ask for.

    All that `Config` offers holds: a ratio of all channels or of single layers, a target in MACs, parameters or
    milliseconds, multiples of `round_to`, and at least `min_channels` in every layer. What must go together does, in
    equal shares where the network needs them.

    Args:
        graph: The network, as a method gets it.
        scores: For each channel group that may be pruned, by its name, an array `(group size,)` with the score of each
            unit; an infinite one stays. Groups without scores stay whole.
        config: The settings.

    Returns:
        Removals, with the note `protected`: layers that would have lost all their channels by score.

    Raises:
        InputError: No budget or several, one that cannot be met or that removes nothing, or nothing to prune.

    Examples:
        >>> import numpy as np, prunekit as pk
        >>> graph = pk.inspect(pk.load("prunekit:vgg_digits")).graph
        >>> draw = np.random.default_rng(0)
        >>> scores = {group.name: draw.random(group.size) for group in graph.groups if group.free}
        >>> plan = pk.plan_by_scores(graph, scores, pk.Config(ratio=0.5, round_to=8))
        >>> {len(keep.index) % 8 for keep in plan.keeps}
        {0}
    """
    groups = [group for group in graph.groups if group.free and group.name in scores]
    if not groups:
        reasons = sorted({group.reason for group in graph.groups if group.reason}) or ["no channel group has scores"]
        raise InputError(
            f"nothing in this model can be pruned: {reasons[0]}", hint="prunekit inspect lists the reasons"
        )
    kept = lowest_removed(graph, groups, scores, config)
    return Plan((Keep(name, index) for name, index in kept.units.items()), {"protected": list(kept.protected)})


def lowest_removed(
    graph: Graph,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    config: Config,
    given: Mapping[str, Sequence[str]] | None = None,
) -> Kept:
    """Return what stays of `groups` when the lowest scores go.

    `given` names, for each group, the layers that may get a bias when it loses units: targets count these.

    Raises:
        InputError: No budget or several, one that cannot be met, or one that removes nothing.
    """
    check_budget(config)
    ratios = ratios_by_group(graph, config, [group.name for group in groups])
    kept = _by_ratios(graph, groups, scores, ratios, config)
    if has_budget(config):
        others = [group for group in groups if group.name not in ratios]
        if not others:
            raise InputError("every layer has a ratio of its own", hint="say how much goes in one way alone")
        kept = _by_threshold(graph, others, scores, config, given or {}, kept)
    if not kept.units:
        raise InputError("the budget is too small to remove a single channel", hint="ask for more, or lower --round-to")
    return kept


def _by_threshold(
    graph: Graph,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    config: Config,
    given: Mapping[str, Sequence[str]],
    settled: Kept,
) -> Kept:
    """Apply one global threshold: remove exactly as many units as the ratio says, or as the target cost needs.

    What is `settled` of other groups stays as it is, and counts for the cost.
    """
    budget = read_budget(config, predict(graph, graph.kept_classes({})))
    removal = removal_order(groups, scores, max(config.min_channels, 1))

    def keeps_at(count: int) -> dict[str, list[int]]:
        widths = round_widths(groups, scores, keep_after(groups, removal, count), config.round_to)
        if budget.goal is not None and config.round_to == 1:
            widths = fill_blocks(groups, scores, widths, budget.goal.block)
        return with_unread_streams(graph, balanced(graph, {**settled.units, **widths}, scores, config.round_to))

    if budget.kind == "ratio":
        total = sum(len(group.free) for group in groups)
        count = min(round(budget.amount * total), len(removal.order))
    else:

        def biases(keeps: Mapping[str, Sequence[int]]) -> set[str]:
            # the highest possible cost: a constant that turns out to be zero needs none
            return {layer for name in keeps for layer in given.get(name, ())}

        count = steps_within(graph, budget, len(removal.order), keeps_at, biases)
    protected = (*settled.protected, *protected_within(groups, scores, removal, count))
    return Kept(keeps_at(count), tuple(dict.fromkeys(protected)))


def _by_ratios(
    graph: Graph, groups: Sequence[ChannelGroup], scores: Scores, ratios: Mapping[str, float], config: Config
) -> Kept:
    """Remove the lowest units of each group that has a ratio of its own."""
    allowed = {group.name: group for group in groups}
    keeps: dict[str, list[int]] = {}
    protected: list[str] = []
    for name, ratio in ratios.items():
        if name not in allowed:
            reason = graph.group(name).reason or "nothing ranks its channels"
            raise InputError(f"channel group '{name}' cannot be pruned: {reason}")
        group = allowed[name]
        removal = removal_order([group], scores, config.min_channels)
        wanted = round(ratio * len(group.free))
        keeps.update(keep_after([group], removal, min(wanted, len(removal.order))))
        protected += removal.protected if wanted > len(removal.order) else ()
    widths = round_widths(groups, scores, keeps, config.round_to)
    return Kept(balanced(graph, widths, scores, config.round_to), tuple(protected))
