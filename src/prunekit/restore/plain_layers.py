"""Which weights are those of plain layers: a module's own `weight`, read by its forward once, and by nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from prunekit.restore.samples import Layer
from prunekit.surgery import Graph, Member
from prunekit.surgery.editing.carriers import CarrierFinder
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.ops import LAYER_OPS

FORWARDS = tuple(kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))


def weight_of(module: str) -> str:
    """The full name of a module's weight."""
    return f"{module}.weight" if module else "weight"


def reads(graph: Graph, module: str) -> list[Node]:
    """The convolutions and matrix products that use a module's weight, in execution order."""
    calls = {node.index: node for node in graph.calls(module)}  # one node may use several of a module's parameters
    return [n for n in calls.values() if n.op in LAYER_OPS and weight_of(module) in n.parameters]


def obstacle(model: nn.Module, graph: Graph, member: Member) -> str | None:
    """Why channels do not sit in the weight of a plain layer there; None where they do."""
    if member.parameter != weight_of(member.module):
        return f"'{member.parameter}' is not the weight of a layer"
    return obstacle_to_layer(model, graph, member.module)


def obstacle_to_layer(model: nn.Module, graph: Graph, name: str) -> str | None:
    """Why a module is no layer whose input and output are those of one op on its weight; None where it is."""
    module = model.get_submodule(name)
    if not isinstance(module, Layer) or weight_of(name) not in graph.parameters:
        return f"a {type(module).__name__} cannot be refitted"
    if type(module).forward not in FORWARDS:
        return f"'{name}' has a forward of its own"
    calls = reads(graph, name)
    if not calls or any(node.module != name for node in calls):
        return "its forward is not called"
    if any(node not in calls for node in graph.calls(name) if node.op in LAYER_OPS):
        return f"'{name}' has several weights"
    return None


def is_plain_norm(model: nn.Module, graph: Graph, name: str) -> bool:
    """Whether a module is a batch norm that uses running statistics, which may then be shifted."""
    module = model.get_submodule(name)
    return isinstance(module, _BatchNorm) and f"{name}.running_mean" in graph.shapes


def possible_biases(model: nn.Module, graph: Graph) -> dict[str, list[str]]:
    """For each group the layers without a bias that would get one for a constant of its channels."""
    carriers, found = CarrierFinder(model, graph), dict[str, list[str]]()
    for group in graph.groups:
        for member in group.consumers:
            for name in carriers.of(member.parameter, member.dim).targets.keys() - graph.shapes.keys():
                found.setdefault(group.name, []).append(name.rpartition(".")[0])
    return found


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer was called with, by position or by name."""
    found: Tensor = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return found
