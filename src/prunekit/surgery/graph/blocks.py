"""Residual blocks that can go as a whole: modules `activation(x + branch(x))` with channels of their own in the branch.

Without these channels the branch gives the same for every input: a constant for each channel of the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prunekit.nn.skipped import ACTIVATIONS
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.labels import Mask
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.ops import POOLS

_EDGES = (*POOLS, "constant_pad_nd")  # of a constant they may make something else at the borders


@dataclass(frozen=True)
class ResidualBlock:
    """A residual block whose branch can go.

    Attributes:
        module: Its name.
        groups: The channel groups that are inside of it.
        cuts: Those of them without any one of which the branch is a constant.
        last: The weight that makes the channels of the branch, and the dimension of it along which they are.
        axis: The dimension of the stream along which they are.
        sum: The number of the node that adds the branch to the block's input, as operand `branch`.
        activation: What follows the sum inside of the block, as the name of the operation and the number of its node.
    """

    module: str
    groups: tuple[str, ...]
    cuts: tuple[str, ...]
    last: tuple[str, int]
    axis: int
    sum: int
    branch: int
    activation: tuple[str, int] | None

    @property
    def constant(self) -> str:
        """The parameter that takes the block's place."""
        return f"{self.module}.bias"

    def holds(self, name: str) -> bool:
        """Return whether a module, or a parameter, is inside of the block."""
        return name == self.module or name.startswith(f"{self.module}.")


def residual_blocks(graph: Graph) -> tuple[ResidualBlock, ...]:
    """Return the residual blocks that can go, in execution order."""
    known: tuple[ResidualBlock, ...] | None = graph.memo.get(residual_blocks)
    if known is None:
        found = {block.module: block for block in _found(graph)}
        for other in graph.on_further():  # there they must look alike
            alike = {block.module: block.cuts for block in _found(other)}
            found = {name: block for name, block in found.items() if alike.get(name) == block.cuts}
        known = graph.memo[residual_blocks] = tuple(found.values())
    return known


def skipped_blocks(graph: Graph, kept: Mask) -> tuple[ResidualBlock, ...]:
    """Return the residual blocks that go where only the `kept` classes stay, the outermost of those in one another."""
    left = np.bincount(graph.group_of[kept & (graph.group_of >= 0)], minlength=len(graph.groups))
    if left.all():
        return ()
    empty = {graph.groups[number].name for number in np.flatnonzero(left == 0)}
    going = [block for block in residual_blocks(graph) if not empty.isdisjoint(block.cuts)]
    return tuple(one for one in going if not any(other is not one and other.holds(one.module) for other in going))


def nodes_left(graph: Graph, skipped: Iterable[ResidualBlock]) -> Sequence[Node]:
    """Return the nodes that still run once some blocks are skipped: of these, the sum and its activation."""
    gone: set[int] = set()
    for block in skipped:
        own = {node.index for node in graph.nodes if block.module in node.modules}
        gone |= own - {block.sum} - ({block.activation[1]} if block.activation else set())
    return [node for node in graph.nodes if node.index not in gone] if gone else graph.nodes


def _found(graph: Graph) -> Iterator[ResidualBlock]:
    inside = _inside(graph)
    for node in graph.nodes:
        if node.op == "add" and len(set(node.inputs)) == 2 and node.settings.get("alpha", 1) == 1:
            names = [name for name in reversed(node.modules) if name and name in graph.plain]
            blocks = (_block(graph, name, inside[name], node) for name in names)
            block = next((block for block in blocks if block is not None), None)
            if block is not None:
                yield block


def _inside(graph: Graph) -> dict[str, list[Node]]:
    """Return the nodes that run while each module does."""
    inside: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.modules:
            inside.setdefault(name, []).append(node)
    return inside


def _block(graph: Graph, name: str, nodes: Sequence[Node], total: Node) -> ResidualBlock | None:
    """Return a module as a residual block of the sum `total`; None where it is none that can go."""
    made = {value for node in nodes for value in node.outputs}
    given = {value for node in nodes for value in node.inputs} - made
    if len(given) != 1 or given.isdisjoint(total.inputs):
        return None
    stream = next(iter(given))
    ours = {node.index for node in nodes}
    maker, activation = graph.maker(stream), _activation(graph, total, ours)
    end = total if activation is None else graph.nodes[activation[1]]
    read = {v for v in made if v in graph.returned or any(r.index not in ours for r in graph.readers(v))}
    if maker is None or maker.shape != total.shape or read != {end.outputs[0]}:
        return None
    place = 0 if total.inputs[1] == stream else 1
    block = ResidualBlock(name, (), (), ("", 0), 0, total.index, place, activation)
    if not all(_only(graph, name, ours) for node in nodes for name in node.parameters):
        return None
    groups = tuple(group.name for group in graph.groups if all(block.holds(m) for m in _modules(graph, group.name)))
    cuts = tuple(group for group in groups if _is_constant(graph, nodes, group, total.inputs[place]))
    last = _last(graph, nodes, total.inputs[place])
    if not cuts or last is None:
        return None
    axis = 1 if any(node.op == "convolution" for node in nodes) else len(total.shape) - 1
    return replace(block, groups=groups, cuts=cuts, last=last, axis=axis)


def _activation(graph: Graph, total: Node, nodes: set[int]) -> tuple[str, int] | None:
    """Return the activation among some nodes that alone reads a sum, by its operation and number."""
    readers = graph.readers(total.outputs[0])
    if len(readers) != 1 or readers[0].op not in ACTIVATIONS or total.outputs[0] in graph.returned:
        return None
    return (readers[0].op, readers[0].index) if readers[0].index in nodes else None


def _only(graph: Graph, parameter: str, nodes: set[int]) -> bool:
    """Return whether a parameter serves these nodes alone."""
    return all(node.index in nodes for node in graph.uses(parameter))


def _modules(graph: Graph, name: str) -> list[str]:
    group = graph.group(name)
    return [member.module for member in (*group.producers, *group.followers, *group.consumers)]


def _is_constant(graph: Graph, nodes: Sequence[Node], name: str, value: int) -> bool:
    """Return whether a value no longer follows the input of a block once a group of channels in it is gone."""
    number = graph.number(name)
    constant: set[int] = set()
    for node in nodes:
        steady = constant.issuperset(node.inputs) and node.op not in _EDGES
        if node.read is not None:
            classes = graph.slots.get((node.read.parameter, node.read.dim))
            blind = classes is not None and bool((graph.group_of[classes] == number).all())
            steady = blind or (steady and not any(node.read.padding))
        if steady:
            constant.update(node.outputs)
    return value in constant


def _last(graph: Graph, nodes: Sequence[Node], value: int) -> tuple[str, int] | None:
    """Return the weight that makes a value, of several the one with most to compute, and its dimension of outputs."""
    makers = {made: node for node in nodes for made in node.outputs}
    found, left = list[Node](), [value]
    while left:
        node = makers.pop(left.pop(), None)
        if node is not None and node.read is not None:
            found.append(node)
        elif node is not None:
            left += node.inputs
    if not found:
        return None
    read = max(found, key=lambda node: node.macs).read
    assert read is not None
    key = read.parameter, 1 - read.dim
    return key if key in graph.slots else None
