"""Does the code follow the width of its input? Run the network at other widths and see, without computing anything.

Labels cannot tell `x.chunk(2)` from `x.split(32)`, nor `x.flatten(1)` from `x.view(-1, 25088)`: they look alike until
the width changes. So every group is halved on the meta device, and each op's result is held against the shape that
its labels foretell. Where the two part, sizes are written into the code, and the channels that arrive there stay.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunekit.surgery.edit import remove
from prunekit.surgery.graph import Graph
from prunekit.surgery.groups import Classes
from prunekit.surgery.labels import Mask, channels_in, compact, ids, varying
from prunekit.surgery.meta import DispatchMode, op_name, run_op
from prunekit.surgery.recording import Flow, Node, Recording, tensors_in

_log = logging.getLogger(__name__)


class MisfitError(Exception):
    """A result has another shape than its labels foretell, or cannot be computed at all."""


def find_fixed(recording: Recording, classes: Classes, graph: Graph, subject: nn.Module, example: Any) -> list[Node]:
    """The nodes whose sizes do not follow their inputs: the first that is found, and its like in sibling modules.

    Empty when the network runs at half its width with every shape as foretold, or cannot be followed.
    """
    kept = _halved(graph)
    half, probe = remove(subject, graph, kept), _Probe(recording, classes, kept)
    try:
        with probe:
            half(*example)
    except Exception as error:  # a forward with fixed sizes fails in as many ways as there are layers
        _log.debug("the probe failed at op %d: %s", probe.position, error)
        if probe.aligned and probe.position < len(graph.nodes):
            return _siblings(graph.nodes, graph.nodes[probe.position], dict(subject.named_modules()))
    return []


def freeze_inputs(recording: Recording, classes: Classes, nodes: Sequence[Node]) -> bool:
    """Freeze what arrives at these nodes; where all of it stays already, what arrives in their modules.

    Returns whether anything new was frozen.
    """
    stuck = np.zeros(classes.count, dtype=np.bool_)
    stuck[[0, *classes.frozen]] = True
    for arriving in (_arriving_at, _arriving_in_modules):
        new = False
        for node, labels in arriving(recording, nodes):
            found = classes.of_label[channels_in(labels)]
            if not stuck[found].all():
                recording.ledger.freeze(labels, f"'{node.op}' in {node.module} has sizes written into the code")
                stuck[found] = new = True
        if new:
            return True
    return False


def _arriving_at(recording: Recording, nodes: Sequence[Node]) -> Iterator[tuple[Node, Tensor]]:
    for node in nodes:
        for labels in recording.flow[node.index].inputs:
            yield node, labels


def _arriving_in_modules(recording: Recording, nodes: Sequence[Node]) -> Iterator[tuple[Node, Tensor]]:
    """Everything that the ops of the nodes' modules read, their inputs among them."""
    by_module = {node.module: node for node in nodes}
    seen: set[int] = set()
    for other in recording.nodes:
        module = other.module
        while module and module not in by_module:
            module = module.rpartition(".")[0]
        for labels in recording.flow[other.index].inputs if module else ():
            if id(labels) not in seen:
                seen.add(id(labels))
                yield by_module[module], labels


def _halved(graph: Graph) -> Mask:
    """Half of the free channels of each group gone.

    Groups that only follow a stream are left to it, and balanced ones have been run at half of their width already.
    """
    followers = {link.norm for link in graph.links}
    balanced = graph.balanced_groups()
    keeps = {}
    for group in graph.groups:
        going = set(group.free[1 : 1 + len(group.free) // 2])
        if going and group.name not in followers and group.name not in balanced:
            keeps[group.name] = [unit for unit in range(group.size) if unit not in going]
    return graph.kept_classes(keeps)


def _siblings(nodes: Sequence[Node], found: Node, modules: dict[str, nn.Module]) -> list[Node]:
    """The same op, counted within its module, in all modules of the same class."""
    kind = type(modules.get(found.module))
    seen: Counter[tuple[str, str]] = Counter()
    same: dict[tuple[str, int], Node] = {}
    number = 0
    for node in nodes:
        if node.op == found.op and type(modules.get(node.module)) is kind:
            same[node.module, seen[node.module, node.op]] = node
            number = seen[node.module, node.op] if node is found else number
            seen[node.module, node.op] += 1
    return [node for (_, place), node in same.items() if place == number]


class _Probe(DispatchMode):
    """Follows a run against what was recorded."""

    def __init__(self, recording: Recording, classes: Classes, kept: Mask) -> None:
        super().__init__()
        self.position = 0
        self.aligned = True
        self._recording = recording
        self._stays = kept[classes.of_label]
        self._expected: dict[int, tuple[int, ...] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and compare shapes."""
        nodes = self._recording.nodes
        if self.position >= len(nodes) or nodes[self.position].op != op_name(func):
            self.aligned = False
        out = run_op(func, args, kwargs or {})
        if self.aligned:
            self._check(out, self._recording.flow[self.position])
        self.position += 1
        return out

    def _check(self, out: Any, flow: Flow) -> None:
        for result, labels in zip(tensors_in((out,)), flow.outputs, strict=False):
            if labels is None:
                continue
            if id(labels) not in self._expected:
                self._expected[id(labels)] = self._foretold(labels)
            expected = self._expected[id(labels)]
            if expected is None or tuple(result.shape) != expected:
                raise MisfitError(f"shape {tuple(result.shape)}, foretold {expected}")

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
