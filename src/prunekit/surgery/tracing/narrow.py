"""Networks narrowed evenly, to learn whether parts of them must keep equally many channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from prunekit.surgery.editing.editor import remove
from prunekit.surgery.graph.balance import Balance, Key, Shares
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.labels import Ids


def narrowed(subject: nn.Module, graph: Graph, balances: Sequence[Balance], shares: Shares) -> nn.Module:
    """Return `subject` with a share of each balance left; any channels will do, since it has no weights."""
    keeps = {
        graph.groups[g].name: range(graph.groups[g].size * share // balance.steps)
        for balance, share in zip(balances, shares, strict=True)
        for g in balance.groups
    }
    return remove(subject, graph, graph.kept_classes(keeps), indices=_first_of_each(graph, balances, shares))


def _first_of_each(graph: Graph, balances: Sequence[Balance], shares: Shares) -> dict[Key, Ids]:
    """Return as many indices of each dimension as its balanced channels have left."""
    indices = {}
    for key, classes in graph.slots.items():
        groups = np.where(classes > 0, graph.group_of[classes], -1)
        stays = np.ones(classes.size, dtype=np.bool_)
        for balance, share in zip(balances, shares, strict=True):
            places = np.flatnonzero(np.isin(groups, balance.groups))
            stays[places[places.size * share // balance.steps :]] = False
        if not stays.all():
            indices[key] = np.flatnonzero(stays)
    return indices
