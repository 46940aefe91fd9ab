"""Choice of the layers that get gates (section "The gate" of the paper's method; its supplement for other families).

Of a residual block every convolution of the main branch, of a plain network every one but the first, of an inverted
residual the expanded channels once, around expansion and depthwise convolution. The stem, shortcuts, projections and
classifiers have none.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from prunekit.errors import InputError
from prunekit.methods.manidp.config import GateRecipe
from prunekit.nn.gated import gated_layers
from prunekit.plan import Gate, Plan
from prunekit.spec import origin_of
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.ops import is_batch_norm


def plan_gates(model: nn.Module, graph: Graph, recipe: GateRecipe) -> Plan:
    """Return the gates of `model`, as a plan; its notes say which convolutions are left, and why.

    Raises:
        InputError: it has gates already, or no layer that could have one.
    """
    if any(gated_layers(model)):
        raise InputError("this network has gates already", hint="give the network that they were trained from")
    finder = _Finder(model, graph)
    gates: list[Gate] = []
    left: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "convolution" or not node.parameters:
            continue
        conv = node.parameters[0].rpartition(".")[0]
        reason = finder.obstacle(node, conv)
        if reason is None:
            gates.append(finder.gate(node, conv, recipe))
        else:
            left[conv] = reason
    inside = {name for gate in gates for name in gate.before}
    gates = [gate for gate in gates if gate.conv not in inside]
    if not gates:
        reasons = "; ".join(dict.fromkeys(left.values())) or "it has no convolution"
        raise InputError(f"no layer of this network can have a gate: {reasons}")
    return Plan(gates, {"left": {name: why for name, why in left.items() if name not in inside}})


class _Finder:
    """Finder that reads the neighbourhood of convolutions from a graph."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.made_by = {value: node for node in graph.nodes for value in node.outputs}
        self.shortcuts = self._shortcuts()

    def obstacle(self, node: Node, conv: str) -> str | None:
        """Return why the convolution gets no gate, or None."""
        module = self.modules.get(conv)
        groups = int(getattr(module, "groups", 1))
        if not hasattr(module, "out_channels") or len({call.index for call in self.graph.calls(conv)}) > 1:
            return "its weights are used in several places"
        if groups > 1 and not self._is_depthwise(conv):
            return "a grouped convolution"
        if not node.inputs or node.inputs[0] not in self.made_by:
            return "the stem"
        if self.graph.batch_norm_after(conv) is None:
            return "no batch norm of its own behind it"
        behind = self._source(node.inputs[0])
        if behind is not None and self._is_depthwise(behind) and not self._is_depthwise(conv):
            return "a projection behind a depthwise convolution"
        if conv in self.shortcuts:
            return "a shortcut"
        return None

    def gate(self, node: Node, conv: str, recipe: GateRecipe) -> Gate:
        """Return the gate of a convolution that can have one."""
        norm = self.graph.batch_norm_after(conv)
        assert norm is not None
        before = self._expansion(node) if self._is_depthwise(conv) else ()
        readers = self.graph.readers(self.graph.calls(norm)[0].outputs[0])
        rectified = len(readers) == 1 and readers[0].op == "relu"
        return Gate(conv, norm, before, recipe.hidden(self.graph.shapes[f"{conv}.weight"][0]), rectified)

    def _is_depthwise(self, conv: str) -> bool:
        module = self.modules[conv]
        return int(getattr(module, "groups", 1)) > 1 and self.graph.shapes[f"{conv}.weight"][1] == 1

    def _source(self, value: int) -> str | None:
        """Return the convolution whose normalised and activated output a value is, past anything with one input."""
        node = self.made_by.get(value)
        while node is not None and node.op != "convolution":
            if len(node.inputs) != 1 and node.op != "mul":
                return None
            # a squeeze-and-excitation's product: the feature map is the operand of its shape
            shaped = [v for v in node.inputs if v in self.made_by and self.made_by[v].shape == node.shape]
            node = self.made_by.get(shaped[0] if shaped else node.inputs[0])
        return node.parameters[0].rpartition(".")[0] if node is not None and node.parameters else None

    def _expansion(self, depthwise: Node) -> tuple[str, ...]:
        """Return the pointwise convolution, batch norm and activation before a depthwise convolution that alone reads
        them, by their modules; empty where they are not three modules of their own.
        """
        activation = self.made_by.get(depthwise.inputs[0])
        norm = self.made_by.get(activation.inputs[0]) if activation and len(activation.inputs) == 1 else None
        conv = self.made_by.get(norm.inputs[0]) if norm and is_batch_norm(norm.op) else None
        if conv is None or norm is None or activation is None or conv.op != "convolution":
            return ()
        chain = (conv, norm, activation)
        names = tuple(node.module for node in chain)
        alone = all(len(self.graph.readers(node.outputs[0])) == 1 for node in chain)
        leaves = all(not list(self.modules[name].children()) for name in names)
        once = all(sum(node.module == name and bool(node.inputs) for node in self.graph.nodes) == 1 for name in names)
        return names if alone and leaves and once and conv.inputs[0] in self.made_by else ()

    def _shortcuts(self) -> set[str]:
        """Return the convolutions whose normalised output is added to that of a longer branch."""
        depth = self._depths()
        found = set()
        for node in self.graph.nodes:
            if node.op != "add" or len(node.inputs) != 2:
                continue
            ends = {value: self._normalised(value) for value in node.inputs}
            for value, conv in ends.items():
                if conv is not None and depth[value] < max(depth.get(v, 0) for v in node.inputs):
                    found.add(conv)
        return found

    def _normalised(self, value: int) -> str | None:
        """Return the convolution that made a value with nothing but its batch norm in between."""
        norm = self.made_by.get(value)
        if norm is None or not is_batch_norm(norm.op):
            return None
        conv = self.made_by.get(norm.inputs[0])
        return conv.parameters[0].rpartition(".")[0] if conv and conv.op == "convolution" and conv.parameters else None

    def _depths(self) -> Mapping[int, int]:
        """Return the number of convolutions on the longest path to each value."""
        depth: dict[int, int] = {}
        for node in self.graph.nodes:
            deepest = max((depth.get(value, 0) for value in node.inputs), default=0)
            for value in node.outputs:
                depth[value] = deepest + (node.op == "convolution")
        return depth


def baseline_of(model: nn.Module) -> float | None:
    """Return a network's validation accuracy before it got gates, 0 to 1, from its history; None where unknown."""
    origin = origin_of(model)
    steps = [step for step in (origin.history if origin else ()) if step.get("method") == "manidp"]
    found = steps[-1].get("baseline_accuracy") if steps else None
    return found if isinstance(found, int | float) else None
