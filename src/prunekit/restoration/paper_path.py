"""Path between a layer and its consumers, and whether a scale passes it: a merged channel is another's multiple.

Behind a batch norm that follows an activation a merged channel is the multiple of another one and a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.restoration.plain_layers import in_between, is_plain_norm, possible_biases
from prunekit.surgery import ChannelGroup, Graph
from prunekit.surgery.editing.carriers import CarrierFinder
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.ops import CONSTANT_STAYS, HOMOGENEOUS, is_batch_norm


@dataclass(frozen=True)
class Path:
    """Path of a merged channel: what `blocks` it, if anything does, and the batch norm `late` on its way, if any.

    `late` stands behind an activation; the one right behind the layer does not count.
    """

    blocks: str | None = None
    late: str | None = None


def path_of(graph: Graph, producer: Node, consumers: set[str]) -> Path:
    """Return the way from a layer to its consumers, given by their parameters."""
    waiting = [(reader, "first") for reader in graph.readers(producer.outputs[0])]
    seen, late = set(), None
    while waiting:
        node, place = waiting.pop()
        if node.index in seen or consumers.intersection(node.parameters):
            continue
        seen.add(node.index)
        if is_batch_norm(node.op) and node.parameters and place == "further" and late is None:
            place, late = "behind", node.parameters[0].rpartition(".")[0]
        elif node.op in (CONSTANT_STAYS if place == "behind" else HOMOGENEOUS):
            place = "further" if place == "first" else place
        elif place == "first" and is_batch_norm(node.op):
            place = "further"
        else:
            return Path(in_between(node))
        if node.outputs:
            waiting += [(reader, place) for reader in graph.readers(node.outputs[0])]
    return Path(late=late)


def obstacle_to_late_norm(model: nn.Module, graph: Graph, group: ChannelGroup, norm: str) -> str | None:
    """Return why the constants that a batch norm behind an activation makes have nowhere to go, or None."""
    if not is_plain_norm(model, graph, norm):
        return f"'{norm}' has no statistics"
    own = next((member for member in group.followers if member.module == norm), None)
    if own is None or not np.array_equal(own.units, np.arange(group.size)):
        return f"'{norm}' stands between this layer and the next, on other channels"
    carriers = CarrierFinder(model, graph)
    made = possible_biases(model, graph).get(group.name, ())
    for member in group.consumers:
        if member.module in made or carriers.of(member.parameter, member.dim).reason is not None:
            return f"'{norm}' stands between this layer and '{member.module}', which has no bias for what it adds"
    return None


def behind_late_norm(scaling: Tensor, norm: _BatchNorm, kept: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Return multiples behind a batch norm: `(removed, kept)`, and the constant that each row adds, `(removed,)`.

    With `x = a y + c` of each channel, `y_r = s y_k` becomes `x_r = (s a_r / a_k) (x_k - c_k) + c_r`. Kept channels
    that the norm hardly scales stand for none.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    a = (norm.running_var.double().cpu() + norm.eps).rsqrt()
    a = a if norm.weight is None else a * norm.weight.detach().double().cpu()
    c = -a * norm.running_mean.double().cpu()
    c = c if norm.bias is None else c + norm.bias.detach().double().cpu()
    matrix = scaling * a[removed, None] / a[kept]
    matrix = torch.where((matrix.abs() <= _LARGEST) & (a[kept].abs() > _FAINT * a.abs().max()), matrix, 0.0)
    merged = (matrix != 0).any(1)
    return matrix, torch.where(merged, c[removed] - matrix @ c[kept], 0.0)


_LARGEST = 10.0  # a scale beyond this means a kept channel that hardly varies
_FAINT = 1e-6
