"""A plan in the network that it is for: checked, and worked out once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from prunekit.errors import SurgeryError
from prunekit.plan import Plan
from prunekit.surgery.graph.blocks import ResidualBlock, residual_blocks, skipped_blocks
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.groups import ChannelGroup
from prunekit.surgery.graph.labels import Ids, Mask

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ResolvedPlan:
    """Plan resolved in its network: what `plan` leaves of the network that `graph` was traced from.

    `keeps` holds the kept units, by name, of each group that loses some, `kept` for each class whether it stays, and
    `indices` the surviving indices of each parameter dimension that loses some (see `Graph.kept_indices`). `skipped`
    are the residual blocks that go, since nothing is kept of channels in them.
    """

    graph: Graph
    plan: Plan
    keeps: Mapping[str, tuple[int, ...]]
    kept: Mask
    indices: Mapping[tuple[str, int], Ids]
    skipped: tuple[ResidualBlock, ...] = ()

    def on(self, graph: Graph) -> ResolvedPlan:
        """Return the same plan on a further example of the graph, which has the same channels."""
        return replace(self, graph=graph)


def resolve(graph: Graph, plan: Plan) -> ResolvedPlan:
    """Check the removals of a plan against the network.

    What plans remove is remembered for the last one: a plan and the same one with restorations remove the same.

    Raises:
        SurgeryError: an unknown group, a group named twice, units out of range, repeated or frozen, or a layer that
            would be left without channels, and is not in a residual block that goes with them.
    """
    last: ResolvedPlan | None = graph.memo.get(resolve)
    if last is None or last.plan.keeps != plan.keeps:
        last = graph.memo[resolve] = _resolved(graph, Plan(plan.keeps))
    return replace(last, plan=plan)


def _resolved(graph: Graph, plan: Plan) -> ResolvedPlan:
    keeps: dict[str, tuple[int, ...]] = {}
    for keep in plan.keeps:
        group = graph.group(keep.group)
        if group.name in keeps:
            raise SurgeryError(f"the plan names channel group '{group.name}' twice (as '{keep.group}')")
        keeps[group.name] = _checked(group, keep.index)
    if graph.links:
        keeps = graph.kept_units(graph.kept_classes(keeps))
    skipped = skipped_blocks(graph, graph.kept_classes(keeps))
    going = {name for block in skipped for name in block.groups}
    for name, index in keeps.items():
        if name not in going:
            _check_layers(graph, graph.group(name), index)
    kept = graph.kept_classes(keeps)
    _log.debug("resolved a plan: %d channel groups lose some", len(keeps))
    return ResolvedPlan(graph, plan, keeps, kept, graph.kept_indices(kept), skipped)


def _check_layers(graph: Graph, group: ChannelGroup, index: tuple[int, ...]) -> None:
    stays = np.zeros(group.size, dtype=np.bool_)
    stays[list(index)] = True
    for member in group.producers:
        if not stays[member.units].any():
            able = [block.cuts[-1] for block in residual_blocks(graph)]
            raise SurgeryError(
                f"the plan leaves '{member.module}' without a single channel",
                hint=f"whole residual blocks go where nothing is kept of one of {', '.join(able)}" if able else None,
            )


def _checked(group: ChannelGroup, index: tuple[int, ...]) -> tuple[int, ...]:
    wrong = [i for i in index if not 0 <= i < group.size]
    if wrong:
        raise SurgeryError(f"group '{group.name}' has channels 0 to {group.size - 1}; the plan keeps {wrong[0]}")
    if len(set(index)) != len(index):
        raise SurgeryError(f"the plan keeps a channel of group '{group.name}' twice")
    stays = np.zeros(group.size, dtype=np.bool_)
    stays[list(index)] = True
    for unit, reason in group.frozen.items():
        if not stays[unit]:
            raise SurgeryError(f"channel {unit} of group '{group.name}' cannot be removed: {reason}")
    return tuple(sorted(index))
