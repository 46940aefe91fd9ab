"""Which ops of a recorded network make, read and compute with what."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from prunekit.surgery.graph.recording import Node
from prunekit.surgery.ops import VIEWS, is_batch_norm


class Wiring:
    """The ways from an op to its neighbours, to its parameters and back. A `Graph` is one, with channels besides.

    `nodes` are the ops in execution order, `returned` the values that the model returns.
    """

    nodes: tuple[Node, ...]
    returned: frozenset[int]

    def uses(self, tensor: str) -> Sequence[Node]:
        """Return the nodes that compute with a parameter or buffer, views of it apart, in execution order."""
        return self._uses.get(tensor, [])

    @cached_property
    def _uses(self) -> dict[str, list[Node]]:
        uses: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.parameters if node.op not in VIEWS else ():
                uses.setdefault(name, []).append(node)
        return uses

    @cached_property
    def _readers(self) -> dict[int, list[Node]]:
        readers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                readers.setdefault(value, []).append(node)
        return readers

    @cached_property
    def _makers(self) -> dict[int, Node]:
        return {value: node for node in reversed(self.nodes) for value in node.outputs}

    def maker(self, value: int) -> Node | None:
        """Return the node that has made a value; None for what the network is given."""
        return self._makers.get(value)

    def readers(self, value: int) -> Sequence[Node]:
        """Return the nodes that read a value, in execution order."""
        return self._readers.get(value, [])

    @cached_property
    def _calls(self) -> dict[str, list[Node]]:
        calls: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.parameters:
                calls.setdefault(name.rpartition(".")[0], []).append(node)
        return calls

    def calls(self, module: str) -> Sequence[Node]:
        """Return the nodes that use the parameters of a module, in execution order."""
        return self._calls.get(module, [])

    def batch_norm_after(self, module: str) -> str | None:
        """Return the batch norm that alone reads the output of a conv or linear layer, or None."""
        norm = self.norm_behind([node for node in self.calls(module) if node.op not in VIEWS])
        return None if norm is None else norm.parameters[0].rpartition(".")[0]

    def norm_behind(self, nodes: Sequence[Node]) -> Node | None:
        """Return a call of the one batch norm that alone reads what some nodes give, or None."""
        found: dict[str, Node] = {}
        for node in nodes:
            value = node.outputs[0]
            readers = self.readers(value)
            if len(readers) != 1 or value in self.returned:
                return None
            if not is_batch_norm(readers[0].op) or not readers[0].parameters:
                return None
            found.setdefault(readers[0].parameters[0].rpartition(".")[0], readers[0])
        return next(iter(found.values())) if len(found) == 1 else None
