"""Channels that need not go together, as long as equally many stay.

A network that cuts its channels into equal parts (`x.chunk(2)`, a channel shuffle) works at any width if all parts keep
equally many. To tie the places of the parts to each other is enough for that, and simple; but where cuts follow each
other with a shuffle in between (ShuffleNet), such ties join all channels into one. There the ties are dropped, and the
groups that they joined must keep the same share instead. Which channel then runs where depends on the width: the
narrowed network, without weights, is traced, and each of its channels is given to one of the original that passes
through the same operations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunekit.surgery.graph.labels import Ids, Mask, compact, distinct, ids, settle
from prunekit.surgery.graph.recording import Recording

Kinds = NDArray[np.uint64]
Key = tuple[str, int]
Shares = tuple[int, ...]


@dataclass(frozen=True)
class Balance:
    """Groups, by number, that keep the same share of their channels: any multiple of `1 / steps`."""

    groups: tuple[int, ...]
    steps: int


@dataclass(frozen=True)
class Traced:
    """A network's channels, as classes, in the dimensions of its parameters, and the kind of each class.

    Channels of one kind pass through the same operations and parameters: they can stand for each other.
    """

    slots: Mapping[Key, Ids]
    kinds: Kinds


def compounding(recording: Recording) -> Mask:
    """Return the labels whose ties by place multiply: one cut ties as many channels as it has parts, these tie more."""
    ledger = recording.ledger
    nothing, everything = np.zeros(ledger.count, dtype=np.bool_), np.ones(ledger.count, dtype=np.bool_)
    if not ledger.stretches:
        return nothing
    tied, free = settle(ledger.count, ledger.ties(nothing)), settle(ledger.count, ledger.ties(everything))
    outs = [ids(slot.labels) for slot in recording.slots.values() if slot.role == "out"]
    joined = settle(ledger.count, [*ledger.ties(nothing), *((np.full_like(out, out[0]), out) for out in outs)])
    parts: dict[int, int] = {}
    for rows in ledger.stretches:
        for where in distinct(joined[rows]):
            parts[int(where)] = max(parts.get(int(where), 1), rows.shape[0])
    loose = []
    for out in outs:
        where = int(joined[out[0]])
        if distinct(free[out]).size > parts.get(where, 1) * distinct(tied[out]).size:
            loose.append(where)
    return np.isin(joined, np.setdiff1d(loose, _bound(recording, joined))) if loose else nothing


def _bound(recording: Recording, joined: Ids) -> Ids:
    """Return the labels that stay tied: what holds something frozen, is normalised, or is chosen by place."""
    bound = [np.zeros(1, dtype=np.int64), *(labels for labels, _ in recording.ledger.frozen)]
    bound += [ids(labels) for pad in recording.pads.values() for labels in (pad.before, pad.after)]
    bound += [ids(labels) for link in recording.links.values() for labels in (link.stream, link.private)]
    bound += [ids(selection.inputs) for selection in recording.selections.values()]
    bound += [ids(labels) for labels in recording.widths.values()]
    bound += [ids(labels) for run in recording.passes for labels in run.normalised.values()]
    return distinct(joined[np.concatenate(bound)])


def balances_of(recording: Recording, loose: Mask, of_label: Ids, group_of: Ids, sizes: Sequence[int]) -> list[Balance]:
    """Return the groups that must keep equal shares, given the labels that no cut ties."""
    cuts = [(np.full(rows.size, rows[0, 0]), rows.ravel()) for rows in recording.ledger.stretches if rows.size]
    joined = settle(recording.ledger.count, [*recording.ledger.ties(np.zeros_like(loose)), *cuts])
    together: dict[int, set[int]] = {}
    for label in np.flatnonzero(loose):
        if group_of[of_label[label]] >= 0:
            together.setdefault(int(joined[label]), set()).add(int(group_of[of_label[label]]))
    merged: list[set[int]] = []
    for groups in together.values():
        apart = [other for other in merged if not other & groups]
        merged = [*apart, groups.union(*(other for other in merged if other & groups))]
    group_of_label = np.where(loose, group_of[of_label], -1)
    return [Balance(tuple(sorted(g)), _steps(recording, group_of_label, sizes, sorted(g))) for g in merged]


def _steps(recording: Recording, group_of_label: Ids, sizes: Sequence[int], groups: Sequence[int]) -> int:
    """Return the number of equal shares into which all groups and all parts that they are cut into can be divided."""
    parts = [int(np.isin(group_of_label[rows[0]], groups).sum()) for rows in recording.ledger.stretches]
    return math.gcd(*(sizes[g] for g in groups), *parts)


def traced(recording: Recording, of_label: Ids, count: int) -> Traced:
    """Return a recording's slots and kinds."""
    slots = {key: of_label[ids(slot.labels)] for key, slot in recording.slots.items()}
    kinds = np.zeros(count, dtype=np.uint64)
    for number, flow in enumerate(recording.passes[0].flow):
        for place, labels in enumerate((*flow.inputs, *flow.outputs)):
            if labels is not None:
                kinds[distinct(of_label[ids(compact(labels))])] += _token(number, place)
    for key, classes in slots.items():
        np.add.at(kinds, classes, _token(*key))
    return Traced(slots, kinds)


def _token(*what: object) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little"))


class Balancer:
    """Layout of the channels in a balanced network of a given width, found by tracing it at that width.

    `narrow` traces the network with the given share of each balance left, if it runs; shares count steps of
    `Balance.steps`.
    """

    def __init__(
        self, balances: Sequence[Balance], full: Traced, group_of: Ids, narrow: Callable[[Shares], Traced | None]
    ) -> None:
        self.balances = tuple(balances)
        self.full: Shares = tuple(balance.steps for balance in balances)
        self._full = full
        self._balance_of = np.full(group_of.size, -1, dtype=np.int64)
        for number, balance in enumerate(balances):
            self._balance_of[np.isin(group_of, balance.groups)] = number
        self._group_of = group_of
        self._narrow = narrow
        self._known: dict[Shares, Traced | None] = {}

    def quotas(self, shares: Shares) -> dict[int, int]:
        """Return the number of places for channels of each kind in a network of these widths; none if it cannot run."""
        narrow = self._at(shares)
        if narrow is None:
            return {}
        kinds, counts = np.unique(narrow.kinds[self._places(narrow)], return_counts=True)
        return dict(zip(kinds.tolist(), counts.tolist(), strict=True))

    def kind_of(self, classes: Ids) -> Kinds:
        """Return the kinds of some classes."""
        return self._full.kinds[classes]

    def shares(self, kept: Mask) -> Shares:
        """Return the smallest width of each balance that has a place for every channel that is kept."""
        shares = [
            max(math.ceil(kept[self._group_of == g].mean() * balance.steps - 1e-9) for g in balance.groups)
            for balance in self.balances
        ]
        while True:
            quotas = self.quotas(tuple(shares))
            wider = {
                number
                for number in range(len(shares))
                for kind, count in zip(*self._kinds_of(kept & (self._balance_of == number)), strict=True)
                if quotas.get(int(kind), 0) < count
            }
            if not wider:
                return tuple(shares)
            for number in wider:
                shares[number] += 1

    def indices(self, kept: Mask) -> dict[Key, Ids]:
        """Return the sources of the places in each parameter dimension that holds balanced channels, -1 for blank ones.

        A network may need a channel at this width that passes through other operations than any of the original's.
        Such a place stays blank: all weights that make or read it are zero.
        """
        ours = kept & (self._balance_of >= 0)
        if np.array_equal(ours, self._balance_of >= 0):
            return {}
        narrow = self._at(self.shares(kept))
        assert narrow is not None  # it has been asked for its quotas
        stands_for = _assign(np.flatnonzero(ours), self._full.kinds, self._places(narrow), narrow.kinds)
        return {
            key: _order(classes, self._balance_of[classes] >= 0, kept, stands_for[narrow.slots[key]])
            for key, classes in self._full.slots.items()
            if (self._balance_of[classes] >= 0).any()
        }

    def _kinds_of(self, classes: Mask) -> tuple[Kinds, Ids]:
        return np.unique(self._full.kinds[classes], return_counts=True)

    def _at(self, shares: Shares) -> Traced | None:
        if shares not in self._known:
            self._known[shares] = self._full if shares == self.full else self._narrow(shares)
        return self._known[shares]

    def _places(self, narrow: Traced) -> Ids:
        """Return the narrow network's balanced classes: those that the balanced layers make."""
        keys = [key for key, classes in self._full.slots.items() if (self._balance_of[classes] >= 0).all()]
        return distinct(np.concatenate([narrow.slots[key] for key in keys]))


def _assign(channels: Ids, kinds: Kinds, places: Ids, kinds_of_places: Kinds) -> Ids:
    """Return the original's class for each class of a narrow network: -1 where it is blank, -2 elsewhere."""
    stands_for = np.full(kinds_of_places.size, -2, dtype=np.int64)
    stands_for[places] = -1
    for kind in np.unique(kinds[channels]):
        own = channels[kinds[channels] == kind]
        stands_for[places[kinds_of_places[places] == kind][: own.size]] = own
    return stands_for


def _order(classes: Ids, ours: Mask, kept: Mask, stands_for: Ids) -> Ids:
    """Return the source of each place of a narrow dimension, given the class that it stands for."""
    result = np.full(stands_for.size, -1, dtype=np.int64)
    result[stands_for == -2] = np.flatnonzero(~ours)
    source = np.flatnonzero(ours & kept[classes])
    source = source[np.argsort(classes[source], kind="stable")]
    target = np.flatnonzero(stands_for >= 0)
    target = target[np.argsort(stands_for[target], kind="stable")]
    result[target] = source
    there: Ids = result[(stands_for != -2) | kept[classes[result]]]
    return there
