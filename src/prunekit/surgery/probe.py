"""Does the code follow the width of its input? Run the network at other widths and see, without computing anything.

Labels cannot tell `x.chunk(2)` from `x.split(32)`, nor `x.flatten(1)` from `x.view(-1, 25088)`: they look alike until
the width changes. So every group is halved on the meta device, and each op is held against the one that was recorded:
the same op, results of the shape that their labels foretell, the same numbers beside the tensors. Where the two part,
sizes are written into the code, and the channels that they part by stay: those that arrive there if the network gets
further once they are whole, else those of the groups that are found by trying.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.surgery.edit import remove
from prunekit.surgery.graph import Graph
from prunekit.surgery.groups import Classes
from prunekit.surgery.labels import Mask, channels_in, compact, ids, varying
from prunekit.surgery.layer_rules import BATCH_NORMS
from prunekit.surgery.meta import DispatchMode, op_name, run_op
from prunekit.surgery.recording import Flow, Node, Pass, Recording, numbers_of, tensors_in
from prunekit.surgery.runs import Source, minds_training, record_training, training_run, twice

_log = logging.getLogger(__name__)

Keeps = Mapping[str, Sequence[int]]
Place = tuple[int, int]

_SIZES = "'{op}' in {module} has sizes written into the code"
_NUMBER = "'{op}' in {module} computes with a number that depends on the width"
_ORDER = "{module} runs other operations at another width, from '{op}' on"

# Ops that come and go with the geometry of a tensor, and mean nothing; and those that stand for each other.
_IDLE = frozenset(("alias", "detach", "clone", "contiguous"))
_NORMS = frozenset((*BATCH_NORMS, "native_layer_norm", "native_group_norm"))
_ALIKE = {"_unsafe_view": "view", "_reshape_alias": "view", "reshape": "view"}


class MisfitError(Exception):
    """The narrowed network does something else than was recorded; holds the reason, to be filled in."""


class _FarEnough(Exception):
    """The narrowed network has come past the place where it used to part."""


@dataclass(frozen=True)
class Misfit:
    """Where the narrowed network parts from the recorded one: at which step of which pass, and why."""

    place: Place
    node: Node
    why: str

    def reason(self, node: Node) -> str:
        """Why channels stay that arrive at `node`, which does what the misfit does."""
        return self.why.format(op=node.op, module=node.module)


def freeze_fixed(recording: Recording, classes: Classes, graph: Graph, source: Source) -> bool:
    """Freeze the channels whose number the code relies on, by the first place where it shows.

    Returns whether anything new is known: whether to settle all facts, and look again.
    """
    prober, keeps = _Prober(recording, classes, graph, source), _halved(graph)
    if not keeps:
        return False
    found = prober.misfit(keeps)
    if found is None:
        return _training_matters(recording, source, prober, keeps)
    _log.debug("step %s: %s", found.place, found.why)
    like = _Like(recording.passes[found.place[0]].nodes, dict(source.model.named_modules()), found.node)
    arriving = prober.groups_at([found.node], found)
    if not prober.explained_by(arriving, keeps, found) or not prober.freeze(like.everywhere(found.node), found):
        return _freeze_culprits(prober, like, keeps, found)
    return True


def _freeze_culprits(prober: _Prober, like: _Like, keeps: Keeps, found: Misfit) -> bool:
    """Freeze groups that are found by trying, and what enters sibling modules where they do; whether there are any."""
    culprits = prober.culprits(keeps, found, prober.groups_at(like.inside, found))
    for name in culprits:
        prober.freeze_group(name, found)
        entry = next((node for node in like.inside if name in prober.groups_at([node], found)), None)
        if entry is not None:
            prober.freeze(like.elsewhere(entry), found)
    return bool(culprits)


class _Like:
    """Finds the same op, counted within its module, in all modules of the class of the one that a misfit is in."""

    def __init__(self, nodes: Sequence[Node], modules: Mapping[str, nn.Module], found: Node) -> None:
        self._top = found.module
        kind = type(modules.get(self._top))
        self._tops = [name for name, module in modules.items() if type(module) is kind and name != self._top]
        self._keys: dict[int, tuple[str, str, int]] = {}
        self._places: dict[tuple[str, str, int], Node] = {}
        seen: Counter[tuple[str, str]] = Counter()
        for node in nodes:
            key = node.module, node.op, seen[node.module, node.op]
            self._keys[node.index], self._places[key] = key, node
            seen[node.module, node.op] += 1
        self.inside = [node for node in nodes if f"{node.module}.".startswith(f"{self._top}.")]

    def elsewhere(self, node: Node) -> list[Node]:
        """The like of a node of the misfit's module in its siblings."""
        module, op, number = self._keys[node.index]
        keys = ((top + module.removeprefix(self._top), op, number) for top in self._tops)
        return [self._places[key] for key in keys if key in self._places]

    def everywhere(self, node: Node) -> list[Node]:
        """A node and its like."""
        return [node, *self.elsewhere(node)]


def _training_matters(recording: Recording, source: Source, prober: _Prober, keeps: Keeps) -> bool:
    """Whether the narrowed network cannot be trained where the whole one can: that is recorded, then."""
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


def _halved(graph: Graph) -> dict[str, list[int]]:
    """The units of each group that are left when half of its free ones go.

    Groups that only follow a stream are left to it, and balanced ones have been run at half of their width already.
    """
    others = {link.norm for link in graph.links} | graph.balanced_groups()
    keeps = {}
    for group in graph.groups:
        going = set(group.free[1 : 1 + len(group.free) // 2])
        if going and group.name not in others:
            keeps[group.name] = [unit for unit in range(group.size) if unit not in going]
    return keeps


class _Prober:
    """Runs a recorded network with some of its groups narrowed."""

    def __init__(self, recording: Recording, classes: Classes, graph: Graph, source: Source) -> None:
        self._recording, self._classes, self._graph, self._source = recording, classes, graph, source
        self._subjects: dict[tuple[bool, bool], nn.Module] = {}

    def misfit(self, keeps: Keeps, until: Place | None = None) -> Misfit | None:
        """The first place in any pass, up to a given one, where the network does something else than was recorded."""
        stays = self._graph.kept_classes(keeps)[self._classes.of_label]
        for number, run in enumerate(self._recording.passes[: until[0] + 1 if until else None]):
            source, steps = Source(self._source.model, run.real), self._steps[number]
            follower = _Follower(run, steps, stays, until[1] if until and until[0] == number else None)
            why = follower.follow(self.narrowed(keeps, source, training=run.training), source)
            if why is not None and steps:
                step = min(follower.position, len(steps) - 1)
                return Misfit((number, step), steps[step][0], why)
        return None

    @cached_property
    def _steps(self) -> list[list[tuple[Node, Flow]]]:
        passes = self._recording.passes
        return [[s for s in zip(run.nodes, run.flow, strict=True) if not _idle(*s)] for run in passes]

    def narrowed(self, keeps: Keeps, source: Source, *, training: bool) -> nn.Module:
        """A copy with only these units of the groups, which has not run yet."""
        key = source.real, training
        if key not in self._subjects:
            self._subjects[key] = source.subject(training)
        return remove(self._subjects[key], self._graph, self._graph.kept_classes(keeps))

    def fails(self, keeps: Keeps, found: Misfit) -> bool:
        """Whether a network of these widths gets no further than it got before."""
        return self.misfit(keeps, until=found.place) is not None

    def explained_by(self, groups: Collection[str], keeps: Keeps, found: Misfit) -> bool:
        """Whether the network gets further once some groups are whole again."""
        rest = {name: units for name, units in keeps.items() if name not in groups}
        return len(rest) < len(keeps) and not self.fails(rest, found)

    def groups_at(self, nodes: Iterable[Node], found: Misfit) -> frozenset[str]:
        """The groups whose channels arrive at some nodes of the pass where a misfit is."""
        flow = self._recording.passes[found.place[0]].flow
        arriving = {id(labels): labels for node in nodes for labels in flow[node.index].inputs}
        numbers: set[int] = set()
        for labels in arriving.values():
            numbers.update(self._graph.group_of[self._classes.of_label[channels_in(labels)]].tolist())
        return frozenset(self._graph.groups[number].name for number in numbers if number >= 0)

    def freeze(self, nodes: Iterable[Node], found: Misfit) -> bool:
        """Freeze what arrives at some nodes; whether that is news."""
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
        """Groups without whose narrowing the network gets further; none where it does not even run twice alike."""
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


def _idle(node: Node, flow: Flow) -> bool:
    """Whether an op does nothing that counts."""
    return node.op in _IDLE or (node.op == "slice" and flow.inputs != () and node.shape == tuple(flow.inputs[0].shape))


class _Follower(DispatchMode):
    """Follows a run against what was recorded."""

    def __init__(self, run: Pass, steps: Sequence[tuple[Node, Flow]], stays: Mask, last: int | None) -> None:
        super().__init__()
        self.position = 0
        self._run = run
        self._last = last
        self._steps = steps
        self._stays = stays
        self._lost = False  # the values have led elsewhere, which tells nothing about widths
        self._expected: dict[int, tuple[int, ...] | None] = {}

    def follow(self, subject: nn.Module, source: Source) -> str | None:
        """Run the subject; why it parts from the recording, if it does."""
        inputs = source.inputs(self._run.inputs)
        try:
            with self:
                source.run(subject, inputs)
        except _FarEnough:
            return None
        except MisfitError as error:
            return str(error)
        except Exception as error:  # a forward with fixed sizes fails in as many ways as there are layers
            _log.debug("the probe failed at step %d: %s", self.position, error)
            return None if self._lost or not (self._run.complete or self._steps[self.position :]) else _SIZES
        return _ORDER if self._steps[self.position :] and not self._lost else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and hold it against the next one that was recorded."""
        name, kwargs = op_name(func), kwargs or {}
        if name in _IDLE:
            return run_op(func, args, kwargs)
        if name == "slice":
            out = run_op(func, args, kwargs)
            return out if out.shape == args[0].shape else self._compared(name, func, args, kwargs, out)
        if name == "_local_scalar_dense":  # the same decisions, whatever the weights that are left say
            step = self._step(name)
            self.position += 1
            return run_op(func, args, kwargs) if step is None else step.numbers[0]
        return self._compared(name, func, args, kwargs, run_op(func, args, kwargs))

    def _compared(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """The results of an op, if they are those that were foretold."""
        step = self._step(name)
        if step is None:
            return out
        results, outputs = list(tensors_in((out,))), step.outputs
        if name in _NORMS:  # the statistics beside have whatever shape the device gives them
            results, outputs = results[:1], outputs[:1]
        if self._led_elsewhere(func, results, step):
            self._lost = True
            return out
        if len(results) != len(outputs) or not all(map(self._fits, results, outputs)):
            raise MisfitError(_SIZES)
        if not all(map(_equal, numbers_of(name, func, args, kwargs, out), step.numbers)):
            raise MisfitError(_NUMBER)
        self.position += 1
        return out

    def _step(self, name: str) -> Flow | None:
        """The next step of the recording; None where there is nothing to compare with any more."""
        if self._last is not None and self.position > self._last:
            raise _FarEnough
        if self.position >= len(self._steps) and not self._run.complete:
            self._lost = True
        if self._lost:
            return None
        if self.position >= len(self._steps):
            raise MisfitError(_ORDER)
        node, flow = self._steps[self.position]
        if _ALIKE.get(node.op, node.op) != _ALIKE.get(name, name):
            raise MisfitError(_ORDER)
        return flow

    def _led_elsewhere(self, func: Any, results: Sequence[Tensor], step: Flow) -> bool:
        """Whether the values of an op's operands gave its results other shapes: boxes that are good enough, say."""
        if not self._run.real or torch.Tag.dynamic_output_shape not in func.tags:
            return False
        return [t.shape for t in results] != [labels.shape for labels in step.outputs if labels is not None]

    def _fits(self, result: Tensor, labels: Tensor | None) -> bool:
        if labels is None:  # a view of a parameter
            return True
        if id(labels) not in self._expected:
            self._expected[id(labels)] = self._foretold(labels)
        return tuple(result.shape) == self._expected[id(labels)]

    def _foretold(self, labels: Tensor) -> tuple[int, ...] | None:
        """The shape once only kept channels are left; None where what is left is no rectangle."""
        shape = list(labels.shape)
        moving = sorted(varying(labels))
        if not moving:
            return tuple(shape)
        small = compact(labels)
        stays = self._stays[ids(small)]
        if len(moving) == 1:
            shape[moving[0]] = int(np.count_nonzero(stays))
            return tuple(shape)
        stays = stays.reshape(small.shape)
        for d in moving:
            shape[d] = int(np.count_nonzero(stays.any(axis=tuple(i for i in moving if i != d))))
        return tuple(shape) if math.prod(shape[d] for d in moving) == np.count_nonzero(stays) else None


def _equal(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)
