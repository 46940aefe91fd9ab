"""Shared streams of pre-activation networks: a channel that no reader keeps can be removed from the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prunekit.surgery import Graph


def with_unread_streams(graph: Graph, keeps: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return `keeps` without the stream channels that only pre-activation batch norms read and all of them drop.

    Each of these batch norms was pruned on its own (Liu et al., ICCV 2017, section 3.3); the layers that add into the
    stream need not make a channel that all have dropped.
    """
    if not graph.links:
        return {name: list(index) for name, index in keeps.items()}
    kept = graph.kept_classes(keeps)
    wanted = np.zeros(kept.size, dtype=np.bool_)
    linked = np.zeros(kept.size, dtype=np.bool_)
    for link in graph.links:
        linked[link.stream] = True
        wanted[link.stream] |= kept[link.private]
    for key, role in graph.roles.items():
        if role == "in":
            wanted[graph.slots[key]] = True
    going = linked & ~wanted & kept
    result = {name: list(index) for name, index in keeps.items()}
    for number, group in enumerate(graph.groups):
        units = graph.unit_of[(graph.group_of == number) & going]
        gone = set(units.tolist()) & set(group.free)
        left = [u for u in result.get(group.name, range(group.size)) if u not in gone]
        if gone and all(np.isin(member.units, left).any() for member in group.producers):
            result[group.name] = left
    return result
