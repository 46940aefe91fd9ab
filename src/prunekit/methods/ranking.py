"""Ranking: from a score for each unit to the units that are kept, in one order of removal, without dead layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunekit.surgery import ChannelGroup, Member

Scores = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Removal:
    """Units in the order of their removal, as `(group number, unit)`, and the layers that were protected."""

    order: tuple[tuple[int, int], ...]
    protected: tuple[str, ...]


class _Layer:
    """Count of the channels that one layer may still lose."""

    def __init__(self, member: Member, floor: int) -> None:
        self.name = member.module
        self.width = np.bincount(member.units)
        self.spare = int(self.width.sum()) - floor

    def can_lose(self, unit: int) -> bool:
        """Return whether the layer may lose `unit` and keep enough channels."""
        return unit >= self.width.size or self.width[unit] == 0 or self.width[unit] <= self.spare

    def lose(self, unit: int) -> None:
        """Record the removal of `unit`."""
        if unit < self.width.size:
            self.spare -= int(self.width[unit])


def removal_order(groups: Sequence[ChannelGroup], scores: Scores, least: int) -> Removal:
    """Order all free units by ascending score, skipping those that would leave a layer fewer than `least` channels.

    `scores` has an entry `(group size,)` for each group by name; a unit with an infinite score is never removed.
    """
    layers = [[_Layer(member, least) for member in group.producers] for group in groups]
    number = np.concatenate([np.full(len(group.free), g) for g, group in enumerate(groups)])
    unit = np.concatenate([np.asarray(group.free, dtype=np.int64) for group in groups])
    value = np.concatenate([scores[group.name][list(group.free)] for group in groups])
    order, protected = [], dict[str, None]()
    for i in np.argsort(value, kind="stable"):
        if not math.isfinite(value[i]):
            break
        g, u = int(number[i]), int(unit[i])
        stuck = [layer for layer in layers[g] if not layer.can_lose(u)]
        if stuck:
            protected.update(dict.fromkeys(layer.name for layer in stuck))
            continue
        for layer in layers[g]:
            layer.lose(u)
        order.append((g, u))
    return Removal(tuple(order), tuple(protected))


def protected_within(groups: Sequence[ChannelGroup], scores: Scores, removal: Removal, count: int) -> list[str]:
    """Return the layers whose protection mattered in the first `count` removals: a unit with a lower score was kept."""
    if not count:
        return []
    g, u = removal.order[count - 1]
    threshold = scores[groups[g].name][u]
    gone = set(removal.order[:count])
    names = dict[str, None]()
    for number, group in enumerate(groups):
        spared = [u for u in group.free if scores[group.name][u] < threshold and (number, u) not in gone]
        if spared:
            names.update(dict.fromkeys(m.module for m in group.producers if np.isin(m.units, spared).any()))
    return [name for name in names if name in removal.protected]


def keep_after(groups: Sequence[ChannelGroup], removal: Removal, count: int) -> dict[str, list[int]]:
    """Return the kept units of every group after the first `count` removals."""
    gone: dict[int, set[int]] = {}
    for g, u in removal.order[:count]:
        gone.setdefault(g, set()).add(u)
    return {groups[g].name: [u for u in range(groups[g].size) if u not in units] for g, units in sorted(gone.items())}


def round_widths(
    groups: Sequence[ChannelGroup], scores: Scores, keeps: Mapping[str, Sequence[int]], unit: int
) -> dict[str, list[int]]:
    """Bring each group's width to the nearest multiple of `unit` channels (at least one), by score.

    Args:
        groups: The channel groups.
        scores: An array `(group size,)` for each group by name; the lowest go, or come back, first.
        keeps: The units that stay, by group.
        unit: What widths are to be multiples of; groups that come back whole are left out.

    Examples:
        >>> import numpy as np, prunekit as pk
        >>> groups = pk.inspect(pk.load("prunekit:resnet20")).groups
        >>> scores = {group.name: np.arange(group.size, dtype=float) for group in groups}
        >>> pk.round_widths(groups, scores, {"layer1.0.conv1": range(5, 16)}, 8)
        {'layer1.0.conv1': [8, 9, 10, 11, 12, 13, 14, 15]}
    """
    if unit == 1:
        return {name: list(index) for name, index in keeps.items()}
    rounded = {}
    for group in groups:
        kept = keeps.get(group.name)
        if kept is None:
            continue
        step = unit // math.gcd(unit, channels_per_unit(group))
        # Halves are rounded down, so that a layer chosen for pruning does not quietly get its full width back.
        wanted = max(step, step * math.ceil(len(kept) / step - 0.5)) if kept else 0  # a block that goes as a whole
        rounded[group.name] = _resize(group, scores[group.name], kept, min(wanted, group.size))
    return {name: index for name, index in rounded.items() if len(index) < _size(groups, name)}


def fill_blocks(
    groups: Sequence[ChannelGroup], scores: Scores, keeps: Mapping[str, Sequence[int]], block: int
) -> dict[str, list[int]]:
    """Let units come back, the best first, until the last block of each group's channels is full: they take no time.

    Groups of less than one block are left as they are, since layers that read them save time with every channel.
    Arguments are those of `round_widths`; groups that come back whole are left out.
    """
    widths = {}
    for group in groups:
        kept = keeps.get(group.name)
        if kept is None:
            continue
        each = channels_per_unit(group)
        channels = len(kept) * each
        wanted = len(kept) if channels <= block else block * math.ceil(channels / block) // each
        widths[group.name] = _resize(group, scores[group.name], kept, min(max(wanted, len(kept)), group.size))
    return {name: index for name, index in widths.items() if len(index) < _size(groups, name)}


def channels_per_unit(group: ChannelGroup) -> int:
    """Return how many channels of its naming layer one unit stands for: more than one in grouped convolutions."""
    named = (m for m in group.producers if group.name in (m.module, m.parameter))
    first = next(named, group.producers[0])
    return max(1, first.units.size // max(1, np.unique(first.units).size))


def _size(groups: Sequence[ChannelGroup], name: str) -> int:
    return next(group.size for group in groups if group.name == name)


def _resize(group: ChannelGroup, scores: NDArray[np.float64], kept: Sequence[int], wanted: int) -> list[int]:
    kept_set, free = set(kept), set(group.free)
    if len(kept_set) > wanted:
        loose = sorted((u for u in kept_set if u in free), key=lambda u: scores[u])
        kept_set -= set(loose[: len(kept_set) - wanted])
    else:
        gone = sorted((u for u in free if u not in kept_set), key=lambda u: -scores[u])
        kept_set |= set(gone[: wanted - len(kept_set)])
    return sorted(kept_set)
