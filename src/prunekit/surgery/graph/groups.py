"""From recorded labels to channel groups: what lives and dies together, and what may not go, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prunekit.surgery.graph.labels import Ids, Mask, distinct, ids, settle
from prunekit.surgery.graph.recording import Recording


@dataclass(frozen=True)
class Member:
    """Place of a group's channels in one dimension of one parameter: `positions[i]` holds unit `units[i]`."""

    parameter: str
    dim: int
    positions: Ids
    units: Ids

    @property
    def module(self) -> str:
        """The module that owns the parameter."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are coupled: each unit is one channel in some layers (several, in grouped convolutions).

    `producers` make the channels, `followers` (batch norms, biases, depthwise convolutions) ride along, `consumers`
    read them. `frozen` maps the units that may not be removed to the reason.

    Examples:
        >>> import prunekit as pk
        >>> group = pk.inspect(pk.load("prunekit:resnet20")).graph.group("layer1.0.conv1")
        >>> group.producers[0].parameter, group.consumers[0].parameter, len(group.followers)
        ('layer1.0.conv1.weight', 'layer1.0.conv2.weight', 4)
        >>> len(group.free), group.reason
        (16, None)
    """

    name: str
    size: int
    producers: tuple[Member, ...]
    followers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    frozen: Mapping[int, str]

    @cached_property
    def free(self) -> tuple[int, ...]:
        """The units that may be removed."""
        if not self.frozen:
            return tuple(range(self.size))
        return tuple(unit for unit in range(self.size) if unit not in self.frozen)

    @property
    def reason(self) -> str | None:
        """Reason for which nothing of this group can be removed, or None when something can."""
        return next(iter(self.frozen.values())) if self.frozen and not self.free else None

    def names(self) -> Iterator[str]:
        """Yield the names that address this group beside its own: parameters that make exactly its units, in order, and
        their modules. A module that makes several groups addresses none of them.
        """
        every = np.arange(self.size)
        for member in self.producers:
            if self.name in (member.module, member.parameter) or np.array_equal(member.units, every):
                yield from dict.fromkeys((member.parameter, member.module or member.parameter))


def frozen_by_reason(groups: Sequence[ChannelGroup]) -> dict[str, list[str]]:
    """Return, for each reason why channels may not go, the groups that it holds in."""
    reasons: dict[str, list[str]] = {}
    for group in groups:
        for reason in dict.fromkeys(group.frozen.values()):
            reasons.setdefault(reason, []).append(group.name)
    return reasons


@dataclass(frozen=True)
class Classes:
    """Classes of the recorded labels: labels of one class name one channel; class 0 is "no channel of ours"."""

    of_label: Ids
    count: int
    frozen: Mapping[int, str]


def classify(recording: Recording, loose: Mask | None = None) -> Classes:
    """Settle all facts of a recording; labels in `loose` are not tied by cuts (see `balance.py`)."""
    ledger = recording.ledger
    root = settle(ledger.count, ledger.ties(np.zeros(ledger.count, dtype=np.bool_) if loose is None else loose))
    first = root == np.arange(ledger.count)  # the smallest label of each class stands for it
    of_label = (np.cumsum(first) - 1)[root]
    count = int(first.sum())
    frozen: dict[int, str] = {}
    seen = np.zeros(count, dtype=np.bool_)
    for labels, reason in ledger.frozen:
        classes = of_label[labels]
        new = distinct(classes[~seen[classes]])
        seen[new] = True
        frozen.update(dict.fromkeys(new.tolist(), reason))
    _freeze_streams(recording, of_label, frozen)
    return Classes(of_label, count, frozen)


def _freeze_streams(recording: Recording, of_label: Ids, frozen: dict[int, str]) -> None:
    """Freeze in the stream that a batch norm reads what must stay behind the norm, through any number of norms."""
    links = [(of_label[ids(link.private)], of_label[ids(link.stream)]) for link in recording.links.values()]
    before = -1
    while before < len(frozen):
        before = len(frozen)
        for private, stream in links:
            for behind, in_front in zip(private.tolist(), stream.tolist(), strict=True):
                if behind in frozen and in_front:
                    frozen.setdefault(in_front, frozen[behind])


def build_groups(recording: Recording, classes: Classes) -> tuple[tuple[ChannelGroup, ...], Ids, Ids]:
    """Return all groups in execution order, and for each class its group and its unit in it (-1 for none)."""
    slots = {key: classes.of_label[ids(slot.labels)] for key, slot in recording.slots.items()}
    outs = [key for key, slot in recording.slots.items() if slot.role == "out"]
    component = settle(classes.count, [(np.full_like(slots[key], slots[key][0]), slots[key]) for key in outs])
    group_of = np.full(classes.count, -1, dtype=np.int64)
    unit_of = np.full(classes.count, -1, dtype=np.int64)
    leaders = _number_units(outs, slots, component, group_of, unit_of)
    members = _members(recording, slots, group_of, unit_of, len(leaders))
    sizes = np.bincount(group_of[group_of >= 0], minlength=len(leaders))
    frozen: list[dict[int, str]] = [{} for _ in leaders]
    stuck = np.fromiter(classes.frozen, np.int64, len(classes.frozen))
    where = zip(group_of[stuck].tolist(), unit_of[stuck].tolist(), classes.frozen.values(), strict=True)
    for group, unit, reason in where:
        if group >= 0:
            frozen[group][unit] = reason
    groups = tuple(
        ChannelGroup(
            name=name,
            size=int(sizes[g]),
            producers=tuple(members["out"][g]),
            followers=tuple(members["along"][g]),
            consumers=tuple(members["in"][g]),
            frozen=_frozen_units(frozen[g], int(sizes[g])),
        )
        for g, name in enumerate(_unique_names(leaders))
    )
    return groups, group_of, unit_of


def _unique_names(leaders: Sequence[tuple[str, int]]) -> list[str]:
    """Return a name for each group, given the slot that makes it: that of the module if it makes no other group, else
    that of the parameter, with its dimension where the parameter makes several groups.
    """
    spellings: list[Callable[[str, int], str]] = [
        lambda name, _: name.rpartition(".")[0] or name,
        lambda name, _: name,
        lambda name, dim: f"{name}[{dim}]",
    ]
    names = [""] * len(leaders)
    for spell in spellings:
        spelt = [spell(*leader) for leader in leaders]
        often = Counter(spelt)
        names = [known or (name if often[name] == 1 else "") for known, name in zip(names, spelt, strict=True)]
    return names


def _frozen_units(frozen: dict[int, str], size: int) -> Mapping[int, str]:
    if size == 1 and not frozen:
        return {0: "a single channel"}
    return dict(sorted(frozen.items()))


def _number_units(
    outs: Sequence[tuple[str, int]],
    slots: Mapping[tuple[str, int], Ids],
    component: Ids,
    group_of: Ids,
    unit_of: Ids,
) -> list[tuple[str, int]]:
    """Fill `group_of` and `unit_of`; return the slot that names each group.

    A group is named after the first layer that makes all of its channels, and numbered in that layer's order.
    """
    by_component: dict[int, list[tuple[str, int]]] = {}
    for key in outs:
        by_component.setdefault(int(component[slots[key][0]]), []).append(key)
    leaders = []
    for group, keys in enumerate(by_component.values()):
        leader = keys[0]
        if len(keys) > 1:
            everything = distinct(np.concatenate([slots[key] for key in keys]))
            whole = (key for key in keys if distinct(slots[key]).size == everything.size)
            leader = next(whole, leader)
        members = _in_order([slots[leader], *(slots[key] for key in keys if key is not leader)])
        group_of[members] = group
        unit_of[members] = np.arange(members.size)
        leaders.append(leader)
    group_of[0] = unit_of[0] = -1
    return leaders


def _in_order(parts: Sequence[Ids]) -> Ids:
    """Return the different numbers in some arrays, each where it comes first."""
    every = np.concatenate(parts)
    order = np.argsort(every, kind="stable")
    ordered = every[order]
    first = np.ones(every.size, dtype=np.bool_)
    first[order[1:][ordered[1:] == ordered[:-1]]] = False
    found: Ids = every[first]
    return found


def _members(
    recording: Recording, slots: Mapping[tuple[str, int], Ids], group_of: Ids, unit_of: Ids, groups: int
) -> dict[str, list[list[Member]]]:
    members: dict[str, list[list[Member]]] = {role: [[] for _ in range(groups)] for role in ("out", "along", "in")}
    for key, slot in recording.slots.items():
        owner, units = group_of[slots[key]], unit_of[slots[key]]
        for group, positions in _places(owner):
            members[slot.role][group].append(Member(slot.parameter, slot.dim, positions, units[positions]))
    return members


def _places(owner: Ids) -> Iterator[tuple[int, Ids]]:
    """Yield each number in `owner` that is not negative, and its places."""
    if not owner.size:
        return
    if (owner == owner[0]).all():
        runs = [np.arange(owner.size)]
    else:
        order = np.argsort(owner, kind="stable")
        runs = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
    for positions in runs:
        if owner[positions[0]] >= 0:
            yield int(owner[positions[0]]), positions
