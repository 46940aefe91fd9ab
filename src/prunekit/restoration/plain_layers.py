"""Weights of plain layers: a module's own `weight`, read as it is by convolutions or products."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.editing.carriers import CarrierFinder
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.ops import LAYER_OPS

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def weight_of(module: str) -> str:
    """Return the full name of a module's weight."""
    return f"{module}.weight" if module else "weight"


def bias_of(module: str) -> str:
    """Return the full name of a module's bias."""
    return f"{module}.bias" if module else "bias"


def reads(graph: Graph, module: str) -> list[Node]:
    """Return the convolutions and matrix products that use a module's weight, in execution order."""
    calls = {node.index: node for node in graph.calls(module)}  # one node may use several of a module's parameters
    return [n for n in calls.values() if n.op in LAYER_OPS and weight_of(module) in n.parameters]


def reads_grouped(graph: Graph, group: ChannelGroup) -> bool:
    """Return whether a grouped convolution reads these channels: each of its groups some of them."""
    calls = [node for member in group.consumers for node in reads(graph, member.module)]
    return any(node.read is not None and node.read.groups != 1 for node in calls)


def in_between(node: Node) -> str:
    """Return the reason that an op is neither passed by what is made up for nor among those that read it."""
    if node.read is not None and node.read.groups > 1:
        return f"the depthwise convolution in {node.module} stands between this layer and the next"
    return f"'{node.op}' in {node.module} stands between this layer and the next"


def obstacle(model: nn.Module, graph: Graph, member: Member) -> str | None:
    """Return why channels do not sit in the weight of a plain layer there; None where they do."""
    if member.parameter != weight_of(member.module):
        return f"'{member.parameter}' is not the weight of a layer"
    return obstacle_to_layer(model, graph, member.module)


def obstacle_to_layer(model: nn.Module, graph: Graph, name: str) -> str | None:
    """Return why a module's weight is not what convolutions or matrix products read through; None where it is."""
    module, weight = model.get_submodule(name), weight_of(name)
    calls = reads(graph, name)
    if weight not in graph.parameters or not (calls or graph.uses(weight)):
        return "its forward is not called" if isinstance(module, Layer) else _no_layer(module)
    if calls and any(node not in calls for node in graph.calls(name) if node.op in LAYER_OPS):
        return f"'{name}' has several weights"
    if not calls or len(calls) != len(graph.uses(weight)):
        return f"'{weight}' is not read as it is" if isinstance(module, Layer) else _no_layer(module)
    for node in calls:
        read = node.read
        if read is None or (read.parameter, read.dim, read.transposed) != (weight, 1, False):
            return _no_layer(module)
        if read.computed or read.bias not in (None, bias_of(name)):
            return f"what '{name}' adds is no bias of its own"
    return None


def _no_layer(module: nn.Module) -> str:
    return f"a {type(module).__name__} cannot be refitted"


def is_plain_norm(model: nn.Module, graph: Graph, name: str) -> bool:
    """Return whether a module is a batch norm that uses running statistics, which may then be shifted."""
    module = model.get_submodule(name)
    return isinstance(module, _BatchNorm) and f"{name}.running_mean" in graph.shapes


def possible_biases(model: nn.Module, graph: Graph) -> dict[str, list[str]]:
    """Return, for each group, the layers without a bias that would get one for a constant of its channels."""
    carriers, found = CarrierFinder(model, graph), dict[str, list[str]]()
    for group in graph.groups:
        for member in group.consumers:
            for name in carriers.of(member.parameter, member.dim).targets.keys() - graph.shapes.keys():
                found.setdefault(group.name, []).append(name.rpartition(".")[0])
    return found
