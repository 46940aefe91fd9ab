"""Shared streams of pre-activation networks: a channel that none of its readers wants any more can go for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prunekit.surgery import Graph


def with_unread_streams(graph: Graph, keeps: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """`keeps`, and the removal of every stream channel that only pre-activation batch norms read, all of them in vain.

    Each of those batch norms was pruned for itself (Liu et al., ICCV 2017, section 3.3); what all have dropped, the
    layers that add into the stream need not make.
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
