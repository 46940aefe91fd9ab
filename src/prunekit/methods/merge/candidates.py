"""Layers that `merge` may narrow: those that the layers behind them can make up for, by the way of restoration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prunekit.restoration.base import Restoration
from prunekit.restoration.makers import Maker, maker_of, obstacle_to_readers
from prunekit.restoration.ways import ClosedForm, Nothing
from prunekit.surgery import ChannelGroup, Graph


@dataclass(frozen=True)
class Candidate(Maker):
    """A layer whose filters may go. `reason` tells why it can only be pruned plainly; None where it is made up for."""

    reason: str | None = None


def candidates(model: nn.Module, graph: Graph, way: Restoration, scope: str) -> tuple[list[Candidate], dict[str, str]]:
    """Return the layers to narrow, and for the other groups why not.

    With `scope` "inner" these are the layers that can be made up for, or, where that is done in closed form, all that
    are no residual streams; with "all", residual streams and all others too.
    """
    found, left = [], {}
    cut = graph.balanced_groups()
    for group in graph.groups:
        reason = "the network cuts these channels into equal parts" if group.name in cut else None
        reason = reason or next(iter(group.frozen.values()), None)
        maker = maker_of(model, graph, group) if reason is None else reason
        if isinstance(maker, Maker):
            reason = _obstacle(model, graph, group, way)
            plainly = isinstance(way, ClosedForm) and _obstacle(model, graph, group, Nothing()) is None
            if reason is None or scope == "all" or plainly:
                found.append(Candidate(maker.group, maker.member, maker.module, maker.writes, reason))
                continue
            maker = reason
        left[group.name] = maker
    return found, left


def _obstacle(model: nn.Module, graph: Graph, group: ChannelGroup, way: Restoration) -> str | None:
    plainly = isinstance(way, Nothing)
    return obstacle_to_readers(graph, group, plainly=plainly) or way.obstacle(model, graph, group)
