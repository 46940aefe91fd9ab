"""The coordinates inside the heads of attention: which of them go together, and what the classes of labels are then.

A head's queries and keys are multiplied coordinate by coordinate, and its values are read by the output projection one
by one. So heads may become narrower, all of one layer alike: a second way to remove what the heads' own groups remove
head by head. It is looked for only when it is asked for, and a channel inside a head then stays where both its head and
its coordinate do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from prunekit.surgery.graph.groups import ChannelGroup, Classes, Member
from prunekit.surgery.graph.labels import Ids, Mask, channels_in, distinct, settle
from prunekit.surgery.graph.recording import HeadProduct, Node, Recording
from prunekit.surgery.ops import HAND_ON, LAYER_OPS, VIEWS

_MOVES = frozenset((*VIEWS, *HAND_ON, "expand", "slice", "select", "split", "split_with_sizes", "unbind", "repeat"))
_SCALES = ("mul", "div")


@dataclass(eq=False)
class Candidate:
    """Coordinates that may go, by labels: `sides` are of shape `(heads, width)`, by what they are in the products.

    `scores` are the labels of the heads of products of queries and keys, of which there are `products`.
    """

    sides: dict[str, list[Ids]]
    scores: list[Ids] = field(default_factory=list)
    power: float = 0.0
    scales: list[tuple[str, str]] = field(default_factory=list)

    @property
    def width(self) -> int:
        """The coordinates of a head."""
        return int(next(iter(self.sides.values()))[0].shape[1])

    @property
    def kind(self) -> str:
        """Which of queries, keys and values they are, in short."""
        return ("qk" if "queries" in self.sides else "") + ("v" if "values" in self.sides else "")


@dataclass(frozen=True)
class HeadWidth:
    """Coordinates inside heads that go together, as a group of that name in the graph.

    `sides` are the classes of queries, keys and values, `(heads, width)` each, place by place; keys that several heads
    share stand there for each of them. The code multiplies scores by a number that goes with `width ** power`: what is
    left of the queries makes up for that. `scales` are attributes of modules that have this number for other ways
    through their code, such as one without fused attention.
    """

    name: str
    heads: str
    sides: Mapping[str, Ids]
    power: float
    scales: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Inside:
    """All coordinates that may go. For each class: its place among `widths`, or -1, and its coordinate."""

    widths: tuple[HeadWidth, ...]
    number_of: Ids
    place_of: Ids

    def lost(self, number: int, stays: Mask) -> Mask:
        """Return the classes that go when only some coordinates stay."""
        gone: Mask = self.number_of == number
        gone[gone] = ~stays[self.place_of[gone]]
        return gone

    def left(self, number: int, kept: Mask) -> Mask:
        """Return the coordinates of which something is left."""
        own = self.number_of == number
        stays = np.zeros(int(self.place_of[own].max()) + 1, dtype=np.bool_)
        stays[self.place_of[own & kept]] = True
        return stays


def names_width(group: str) -> bool:
    """Return whether a group's name is that of a width of heads."""
    return group.endswith(("[qk]", "[v]", "[qkv]"))


def candidates(recording: Recording, classes: Classes) -> list[Candidate]:
    """Return the coordinates of each product of heads by themselves: of queries and keys, of values."""
    ledger, found = recording.ledger, dict[tuple[int, ...], Candidate]()
    products = [(one, _sides(one)) for one in recording.inside]
    together = [
        (np.broadcast_to(next(iter(sides.values()))[:1], side.shape).ravel(), side.ravel())
        for _, sides in products
        for side in sides.values()
    ]
    column = settle(ledger.count, [*ledger.pairs, *together])
    for one, sides in products:
        key = tuple(column[next(iter(sides.values()))[0]].tolist())
        if len(set(key)) < len(key) or len(key) < 2 or any((side == 0).any() for side in sides.values()):
            continue
        candidate = found.setdefault(key, Candidate({name: [] for name in sides}))
        for name, side in sides.items():
            candidate.sides.setdefault(name, []).append(side)
        if "queries" in sides:
            candidate.scores.append(channels_in(one.heads))
    apart = [one for key, one in found.items() if not any(set(key) & set(other) for other in found if other != key)]
    frozen = np.fromiter(classes.frozen, np.int64, len(classes.frozen))
    return [one for one in apart if not np.isin(classes.of_label[_labels(one)], frozen).any()]


def _sides(product: HeadProduct) -> dict[str, Ids]:
    """Return the labels of queries and of the keys that each head of them meets, or those of values: once a head."""
    if product.right is None:
        return {"values": np.unique(product.left.numpy(), axis=0)}
    both = np.unique(np.hstack([product.left.numpy(), product.right.numpy()]), axis=0)
    return {"queries": both[:, : both.shape[1] // 2], "keys": both[:, both.shape[1] // 2 :]}


def joined(several: Sequence[Candidate], classes: Classes) -> list[Candidate]:
    """Return candidates of the same heads as one: code often has one width for queries, keys and values."""
    by_heads: dict[tuple[int, ...], list[Candidate]] = {}
    for one in several:
        heads = tuple(distinct(classes.of_label[_labels(one)]).tolist())
        by_heads.setdefault((one.width, *heads), []).append(one)
    return [
        Candidate(
            {name: [side for one in same for side in one.sides.get(name, [])] for name in _names(same)},
            [scores for one in same for scores in one.scores],
        )
        for same in by_heads.values()
        if len(same) > 1
    ]


def _names(several: Sequence[Candidate]) -> list[str]:
    return list(dict.fromkeys(name for one in several for name in one.sides))


def _labels(one: Candidate) -> Ids:
    return np.concatenate([side.ravel() for sides in one.sides.values() for side in sides])


def obstacle(recording: Recording, one: Candidate) -> str | None:
    """Return what is done to coordinates on their way that is not the same for any mixture of them, or None."""
    products = {(product.run, product.node) for product in recording.inside}
    values = np.concatenate([side.ravel() for side in one.sides.get("values", [np.zeros(0, dtype=np.int64)])])
    mine = _columns(recording, [one])[0] >= 0
    only_values = np.zeros_like(mine)
    only_values[values] = True
    for number, run in enumerate(recording.passes):
        for node, flow in zip(run.nodes, run.flow, strict=True):
            arriving = [labels for labels in map(channels_in, flow.inputs) if mine[labels].any()]
            if not arriving or (number, node.index) in products:
                continue
            reads = node.op in LAYER_OPS and all(only_values[labels[mine[labels]]].all() for labels in arriving)
            if not reads and not _moves(node):
                return f"'{node.op}' in {node.module}"
    return None


def _moves(node: Node) -> bool:
    """Return whether an op only moves coordinates, scales all of them alike, or adds a bias."""
    alone = len(node.inputs) == 1
    return (
        node.op in _MOVES
        or (node.op in _SCALES and alone and not node.parameters)
        or (node.op == "add" and alone and bool(node.parameters))
    )


def _columns(recording: Recording, several: Sequence[Candidate]) -> tuple[Ids, Ids]:
    """Return, for each label, the number of its candidate, or -1, and its coordinate."""
    count = recording.ledger.count
    firsts = [next(iter(one.sides.values()))[0][0] for one in several]
    ties = [
        (np.broadcast_to(first, side.shape).ravel(), side.ravel())
        for one, first in zip(several, firsts, strict=True)
        for sides in one.sides.values()
        for side in sides
    ]
    column = settle(count, [*recording.ledger.pairs, *ties])
    number, place = np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int64)
    for i, first in enumerate(firsts):
        number[column[first]], place[column[first]] = i, np.arange(first.size)
    return number[column], place[column]


@dataclass(frozen=True)
class Finer:
    """Classes of labels where heads are taken apart, with those of units and of coordinates by themselves at the end.

    `coarse` is the class that each has while heads go whole, 0 for a coordinate by itself.
    """

    classes: Classes
    coarse: Ids
    number_of: Ids
    place_of: Ids
    of_unit: Mapping[int, int]  # from the coarse class of a head
    of_place: Mapping[tuple[int, int], int]

    def counted(self, labels: Ids) -> Ids:
        """Return the classes that a number counts by labels: of heads and of coordinates, or of either alone."""
        found = self.classes.of_label[labels]
        if (self.number_of[found] < 0).any():
            return found
        places = list(zip(self.number_of[found].tolist(), self.place_of[found].tolist(), strict=True))
        if distinct(self.coarse[found]).size == 1:
            return np.array([self.of_place[one] for one in places])
        if len(set(places)) == 1:
            return np.array([self.of_unit[one] for one in self.coarse[found].tolist()])
        return found


def finer(recording: Recording, classes: Classes, several: Sequence[Candidate]) -> Finer:
    """Return the classes of labels where some heads are taken apart."""
    ledger = recording.ledger
    number, place = _columns(recording, several)
    inside = number >= 0
    within = [(a[own], b[own]) for a, b in ledger.within for own in [~inside[a] & ~inside[b]]]
    root = settle(ledger.count, [*ledger.pairs, *within, *ledger.cut_ties(inside)])
    first = root == np.arange(ledger.count)
    of_label = (np.cumsum(first) - 1)[root]
    firsts = np.flatnonzero(first)
    coarse, number_of, place_of = classes.of_label[firsts], number[firsts], place[firsts]
    units = distinct(coarse[number_of >= 0]).tolist()
    places = sorted(set(zip(number_of[number_of >= 0].tolist(), place_of[number_of >= 0].tolist(), strict=True)))
    start = firsts.size + len(units)
    blank = np.full(len(units), -1, dtype=np.int64)
    both = np.array(places, dtype=np.int64).reshape(-1, 2)
    coarse = np.concatenate([coarse, np.array(units, dtype=np.int64), np.zeros(len(places), dtype=np.int64)])
    frozen = {i: classes.frozen[c] for i, c in enumerate(coarse.tolist()) if c and c in classes.frozen}
    return Finer(
        Classes(of_label, start + len(places), frozen),
        coarse,
        np.concatenate([number_of, blank, both[:, 0]]),
        np.concatenate([place_of, blank, both[:, 1]]),
        {unit: firsts.size + i for i, unit in enumerate(units)},
        {one: start + i for i, one in enumerate(places)},
    )


def inside_of(several: Sequence[Candidate], fine: Finer, heads: Mapping[int, str]) -> Inside:
    """Return the coordinates as groups of a graph; `heads` are the names of the heads' groups by coarse class."""
    widths = []
    for one in several:
        sides = {name: fine.classes.of_label[own[0]] for name, own in one.sides.items()}
        owner = heads[int(fine.coarse[next(iter(sides.values()))[0, 0]])]
        widths.append(HeadWidth(f"{owner}[{one.kind}]", owner, sides, one.power, tuple(one.scales)))
    return Inside(tuple(widths), fine.number_of, fine.place_of)


def group_of_width(
    inside: Inside, number: int, slots: Mapping[tuple[str, int], Ids], roles: Mapping[tuple[str, int], str]
) -> ChannelGroup:
    """Return coordinates as a group of channels: a unit is what all heads have at one place."""
    members: dict[str, list[Member]] = {"out": [], "along": [], "in": []}
    for (parameter, dim), classes in slots.items():
        positions = np.flatnonzero(inside.number_of[classes] == number)
        if positions.size:
            units = inside.place_of[classes[positions]]
            members[roles[parameter, dim]].append(Member(parameter, dim, positions, units))
    size = next(iter(inside.widths[number].sides.values())).shape[1]
    out, along, read = (tuple(own) for own in members.values())
    return ChannelGroup(inside.widths[number].name, size, out, along, read, {})
