"""Test whether code follows the width of its input: the network runs at other widths, without computing anything.

Labels cannot tell `x.chunk(2)` from `x.split(32)`, nor `x.flatten(1)` from `x.view(-1, 25088)`: they look alike until
the width changes. So every group is narrowed on the meta device, and each op is held against the one that was recorded:
the same op, results of the shape that their labels foretell, the same numbers beside the tensors. Where the two part,
sizes are written into the code, and the channels that they part by stay: those that arrive there if the network gets
further once they are whole, else those of the groups that are found by trying.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from prunekit.surgery.editing.attributes import set_numbers, with_counts
from prunekit.surgery.editing.editor import remove
from prunekit.surgery.execution.sources import Source
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.groups import Classes
from prunekit.surgery.graph.labels import Mask, channels_in, ids
from prunekit.surgery.graph.recording import Node, Recording
from prunekit.surgery.tracing.counted import Address, lines_of, plain_numbers, ways_to_count
from prunekit.surgery.tracing.follow import Follower, Step, steps_of
from prunekit.surgery.tracing.runs import minds_training, record_training, training_run, twice

_log = logging.getLogger(__name__)

Keeps = Mapping[str, Sequence[int]]
Place = tuple[int, int]


@dataclass(frozen=True)
class Misfit:
    """Place where the narrowed network parts from the recorded one: step, pass, and the reason (a template)."""

    place: Place
    node: Node
    why: str

    def reason(self, node: Node) -> str:
        """Return why channels stay that arrive at `node`, which does what the misfit does."""
        return self.why.format(op=node.op, module=node.module)


def freeze_fixed(recording: Recording, classes: Classes, graph: Graph, source: Source) -> bool:
    """Freeze the channels whose number the code relies on, by the first place where it shows.

    Returns whether anything new is known: whether to settle all facts, and look again.
    """
    prober, keeps = Prober(recording, classes, graph, source), _thinned(graph)
    if not keeps:
        return False
    modules, counted = dict(source.model.named_modules()), False
    while (found := prober.misfit(keeps)) is not None:
        _log.debug("step %s: %s", found.place, found.reason(found.node))
        like = Like(recording.passes[found.place[0]].nodes, modules, found.node)
        if not prober.count(modules, like, keeps, found):
            break
        counted = True
    if counted:
        return True
    if found is None:
        return _training_matters(recording, source, prober, keeps)
    if prober.join_norms(like.everywhere(found.node), found):
        return True
    arriving = prober.groups_at([found.node], found)
    if not prober.explained_by(arriving, keeps, found) or not prober.freeze(like.everywhere(found.node), found):
        return _freeze_culprits(prober, like, keeps, found)
    return True


def _freeze_culprits(prober: Prober, like: Like, keeps: Keeps, found: Misfit) -> bool:
    """Freeze groups that are found by trying, and what enters sibling modules there; return whether there are any."""
    culprits = prober.culprits(keeps, found, prober.groups_at(like.inside, found))
    for name in culprits:
        prober.freeze_group(name, found)
        entry = next((node for node in like.inside if name in prober.groups_at([node], found)), None)
        if entry is not None:
            prober.freeze(like.elsewhere(entry), found)
    return bool(culprits)


class Like:
    """Finder of the same op in all modules of the class whose code a misfit is in; not in PyTorch's layers."""

    def __init__(self, nodes: Sequence[Node], modules: Mapping[str, nn.Module], found: Node) -> None:
        self._top = found.module
        while self._top and type(modules.get(self._top)).__module__.startswith("torch.nn."):
            self._top = self._top.rpartition(".")[0]
        own = type(modules.get(self._top))
        self._tops = [name for name, module in modules.items() if type(module) is own and name != self._top]
        self._keys: dict[int, tuple[str, str, int]] = {}
        self._places: dict[tuple[str, str, int], Node] = {}
        seen: Counter[tuple[str, str]] = Counter()
        for node in nodes:
            key = node.module, node.op, seen[node.module, node.op]
            self._keys[node.index], self._places[key] = key, node
            seen[node.module, node.op] += 1
        prefix = f"{self._top}." if self._top else ""
        self.inside = [node for node in nodes if f"{node.module}.".startswith(prefix)]

    def elsewhere(self, node: Node) -> list[Node]:
        """Return the nodes in sibling modules that are like a node of the misfit's module."""
        module, op, number = self._keys[node.index]
        keys = ((top + module.removeprefix(self._top), op, number) for top in self._tops)
        return [self._places[key] for key in keys if key in self._places]

    def twins(self, node: Node, module: str) -> Iterator[tuple[Node, str]]:
        """Yield a node and those like it, each with what is to it as `module` is to the first."""
        yield node, module
        if f"{module}.".startswith(f"{self._top}."):
            for other in self.elsewhere(node):
                top = other.module.removesuffix(node.module.removeprefix(self._top))
                yield other, top + module.removeprefix(self._top)

    def everywhere(self, node: Node) -> list[Node]:
        """Return a node and those like it."""
        return [node, *self.elsewhere(node)]


def _training_matters(recording: Recording, source: Source, prober: Prober, keeps: Keeps) -> bool:
    """Return whether the narrowed network cannot be trained where the whole one can: that is recorded, then."""
    if any(run.training for run in recording.passes) or not minds_training(source.model):
        return False
    whole, inputs = Source(source.model), twice(recording.passes[0].inputs)
    wanted = training_run(whole, inputs)
    if (
        isinstance(wanted, Exception)
        or training_run(whole, inputs, prober.narrowed(keeps, whole, training=True)) == wanted
    ):
        return False
    record_training(recording, source, recording.passes[0].inputs)
    return any(run.training for run in recording.passes)


def _thinned(graph: Graph) -> dict[str, list[int]]:
    """Return the units of each group that are left when about half of its free ones go.

    Groups of one size are left with different widths, for code may take two of them to be equal. Groups that only
    follow a stream are left to it, and balanced ones have been run at half of their width already.
    """
    others = {link.norm for link in graph.links} | graph.balanced_groups()
    keeps, before = {}, Counter[int]()
    for group in graph.groups:
        most = len(group.free) // 2
        if most and group.name not in others:
            going = set(group.free[1 : 1 + most - before[group.size] % most])
            keeps[group.name] = [unit for unit in range(group.size) if unit not in going]
            before[group.size] += 1
    for name in _starving(graph, keeps):
        group = graph.group(name)
        keeps[name] = [unit for unit in range(group.size) if unit != group.free[0]]
    return keeps


def _starving(graph: Graph, keeps: Keeps) -> set[str]:
    """Return the streams that leave a reader, whose channels are tied among themselves, without any."""
    kept = graph.kept_classes(keeps)
    numbers = {int(n) for link in graph.links if not kept[link.private].any() for n in graph.group_of[link.stream]}
    return {graph.groups[number].name for number in numbers if number >= 0} & keeps.keys()


class Prober:
    """Runner of a recorded network with some of its groups narrowed.

    `scales` takes what becomes of factors (see `Follower`). `rows` are labels of the coordinates of a head, which
    numbers may count where all heads are laid out along one line.
    """

    def __init__(
        self,
        recording: Recording,
        classes: Classes,
        graph: Graph,
        source: Source,
        scales: dict[int, float] | None = None,
        rows: Sequence[Tensor] = (),
    ) -> None:
        self._scales, self._rows = scales, rows
        self._recording, self._classes, self._graph, self._source = recording, classes, graph, source
        self._subjects: dict[tuple[bool, bool], nn.Module] = {}
        self._trial: dict[Address, Tensor] = {}

    def misfit(self, keeps: Keeps, until: Place | None = None) -> Misfit | None:
        """Return the first place in any pass, up to a given one, where the network departs from what was recorded."""
        stays = self._stays(keeps)
        for number, run in enumerate(self._recording.passes[: until[0] + 1 if until else None]):
            source, steps = Source(self._source.model, run.real), self._steps[number]
            last = until[1] if until and until[0] == number else None
            follower = Follower(run, steps, stays, last, self._scales if number == 0 else None)
            subject = self.narrowed(keeps, source, training=run.training)
            follower.overlook(m for n, m in subject.named_modules() if n not in self._graph.selections)
            why = follower.follow(subject, source)
            if why is not None and steps:
                step = min(follower.position, len(steps) - 1)
                return Misfit((number, step), steps[step][0], why)
        return None

    @cached_property
    def _steps(self) -> list[list[Step]]:
        return [steps_of(run) for run in self._recording.passes]

    def narrowed(self, keeps: Keeps, source: Source, *, training: bool) -> nn.Module:
        """Return a copy with only these units of the groups, which has not run yet."""
        key = source.real, training
        if key not in self._subjects:
            self._subjects[key] = source.subject(training)
        small = remove(self._subjects[key], self._graph, self._graph.kept_classes(keeps))
        stays = self._stays(keeps)
        numbers = {module: dict(own) for module, own in self._recording.numbers.items()}
        for (module, name, place), labels in self._trial.items():
            numbers.setdefault(module, {})[name, place] = labels
        for module, own in numbers.items():
            subject = small.get_submodule(module)
            counts = {number: int(np.count_nonzero(stays[ids(labels)])) for number, labels in own.items()}
            set_numbers(subject, with_counts(subject, counts))
        return small

    def _stays(self, keeps: Keeps) -> Mask:
        """Return, for each label, whether it is left."""
        return self._graph.kept_classes(keeps)[self._classes.of_label]

    def count(self, modules: Mapping[str, nn.Module], like: Like, keeps: Keeps, found: Misfit) -> bool:
        """Find the numbers of modules that count what the network parts by; return whether there are any."""
        known = self._recording.numbers
        lines = self._lines(found.node, found)
        for way in ways_to_count(modules, found.node.module, lines, self._stays(keeps)):
            if any((name, place) in known.get(module, {}) for module, name, place in way):
                continue
            self._trial = {address: lines[i] for address, i in way.items()}
            passes = not self.fails(keeps, found)
            self._trial = {}
            if passes:
                for address, i in way.items():
                    self._count_alike(modules, like, found, address, i)
                return True
        return False

    def _count_alike(
        self, modules: Mapping[str, nn.Module], like: Like, found: Misfit, address: Address, i: int
    ) -> None:
        """Note that a number counts a line of results, and those of sibling modules the lines of theirs."""
        module, name, place = address
        for node, twin in like.twins(found.node, module):
            lines = self._lines(node, found)
            same = i < len(lines) and plain_numbers(modules[twin]).get((name, place)) == lines[i].numel()
            if same:
                self._recording.numbers.setdefault(twin, {}).setdefault((name, place), lines[i])

    def _lines(self, node: Node, found: Misfit) -> list[Tensor]:
        flow = self._recording.passes[found.place[0]].flow
        step = flow[node.index]
        met = [ids(labels) for labels in step.inputs if self._rows]
        rows = [row for row in self._rows if any(np.isin(ids(row), labels).all() for labels in met)]
        return [*lines_of(self._recording, node, step), *rows]

    def fails(self, keeps: Keeps, found: Misfit) -> bool:
        """Return whether a network of these widths gets no further than it got before."""
        return self.misfit(keeps, until=found.place) is not None

    def explained_by(self, groups: Collection[str], keeps: Keeps, found: Misfit) -> bool:
        """Return whether the network gets further once some groups are whole again."""
        rest = {name: units for name, units in keeps.items() if name not in groups}
        return len(rest) < len(keeps) and not self.fails(rest, found)

    def groups_at(self, nodes: Iterable[Node], found: Misfit) -> frozenset[str]:
        """Return the groups whose channels arrive at some nodes of the pass where a misfit is."""
        flow = self._recording.passes[found.place[0]].flow
        arriving = {id(labels): labels for node in nodes for labels in flow[node.index].inputs}
        numbers: set[int] = set()
        for labels in arriving.values():
            numbers.update(self._graph.group_of[self._classes.of_label[channels_in(labels)]].tolist())
        return frozenset(self._graph.groups[number].name for number in numbers if number >= 0)

    def join_norms(self, nodes: Iterable[Node], found: Misfit) -> bool:
        """Join batch norms whose channels arrive at some nodes to those in front; return whether there are any."""
        flow = self._recording.passes[found.place[0]].flow
        arriving = [channels_in(labels) for node in nodes for labels in flow[node.index].inputs]
        classes = self._classes.of_label[np.concatenate([*arriving, np.zeros(1, dtype=np.int64)])]
        links = self._recording.links
        joined = [
            s for s in links if np.isin(self._classes.of_label[ids(links[s].private)], classes[classes > 0]).any()
        ]
        for scale in joined:
            self._recording.join(scale)
        return bool(joined)

    def freeze(self, nodes: Iterable[Node], found: Misfit) -> bool:
        """Freeze what arrives at some nodes; return whether that is news."""
        stuck = np.zeros(self._classes.count, dtype=np.bool_)
        stuck[[0, *self._classes.frozen]] = True
        flow, news = self._recording.passes[found.place[0]].flow, False
        for node in nodes:
            for labels in flow[node.index].inputs:
                news |= not stuck[self._classes.of_label[channels_in(labels)]].all()
                self._recording.ledger.freeze(labels, found.reason(node))
        return news

    def freeze_group(self, name: str, found: Misfit) -> None:
        """Freeze all channels of a group."""
        number = next(n for n, group in enumerate(self._graph.groups) if group.name == name)
        labels = np.flatnonzero(np.isin(self._classes.of_label, self._graph.classes_in(number)))
        self._recording.ledger.frozen.append((labels, found.reason(found.node)))

    def culprits(self, keeps: Keeps, found: Misfit, likely: Collection[str]) -> list[str]:
        """Return groups without whose narrowing the network gets further; none where it does not run twice alike."""
        if self.fails({}, found):
            _log.debug("the network does not run alike twice")
            return []
        rest: dict[str, Sequence[int]] = {}
        if self.explained_by(likely, keeps, found):
            rest = {name: units for name, units in keeps.items() if name not in likely}
        return self._search({name: units for name, units in keeps.items() if name not in rest}, rest, found)

    def _search(
        self, suspects: dict[str, Sequence[int]], innocent: dict[str, Sequence[int]], found: Misfit
    ) -> list[str]:
        """Halve the suspects until single ones are left; `innocent` grows by those that do no harm."""
        if not self.fails(innocent | suspects, found):
            innocent.update(suspects)
            return []
        if len(suspects) == 1:
            return list(suspects)
        names = list(suspects)
        parts = names[: len(names) // 2], names[len(names) // 2 :]
        return [name for part in parts for name in self._search({n: suspects[n] for n in part}, innocent, found)]
