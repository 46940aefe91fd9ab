"""Residual blocks that go as a whole: what their branches gave on average goes on being added."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.plan import Fold, Plan
from prunekit.restoration.images import Inputs, bytes_per_image, in_batches, tensors_of
from prunekit.restoration.plain_layers import obstacle_to_layer, reads, weight_of
from prunekit.surgery import Graph, resolve
from prunekit.surgery.editing.carriers import CarrierFinder
from prunekit.surgery.execution.hooks import hooked

_BATCH = 128  # images at a time, at most
_RANK = 1e-3  # singular values below this part of the largest say nothing


@dataclass
class _Sums:
    """What the last layer of a branch reads and gives, summed over batches of images, in double precision."""

    layer: str
    group: str
    given: Tensor = field(default_factory=lambda: torch.zeros(()))
    made: Tensor = field(default_factory=lambda: torch.zeros(()))

    def note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add a batch."""
        axis = -1 if isinstance(layer, nn.Linear) else 1
        given, made = (x.movedim(axis, -1).flatten(0, -2).double().mean(0).cpu() for x in (inputs[0], output))
        self.given, self.made = self.given + len(output) * given, self.made + len(output) * made


def branch_means(model: nn.Module, graph: Graph, plan: Plan, images: Tensor | Inputs, memory: int) -> list[Fold]:
    """Return folds by which branches that go give what they gave on average over images, borders included.

    None for a branch whose last layer is no plain one, cannot take over constants, or has such a fold already.
    """
    found = list(_last_layers(model, graph, plan).values())
    if not found:
        return []
    network = [(one, model.get_submodule(one.layer)) for one in found]
    size = max(1, min(_BATCH, memory // 4 // bytes_per_image(graph)))
    with torch.no_grad(), hooked(layer.register_forward_hook(one.note) for one, layer in network):
        for batch in in_batches(images, size):
            model(*tensors_of(batch))
    return [
        Fold(graph.address(weight_of(one.layer)), one.group, offset=_offset(layer, one, len(images)))
        for one, layer in network
    ]


def _last_layers(model: nn.Module, graph: Graph, plan: Plan) -> dict[str, _Sums]:
    """Return the last layers of the branches that go, by name."""
    told = {(graph.weight_at(fold.consumer), graph.group(fold.group).name) for fold in plan.folds}
    carriers, resolved, found = CarrierFinder(model, graph), resolve(graph, plan), dict[str, _Sums]()
    for block in resolved.skipped:
        weight, dim = block.last
        layer, classes = weight.rpartition(".")[0], graph.slots.get((weight, 1 - dim))
        if classes is None or obstacle_to_layer(model, graph, layer) is not None or len(reads(graph, layer)) != 1:
            continue
        numbers = np.unique(graph.group_of[classes])
        if len(numbers) != 1 or numbers[0] < 0 or carriers.of(weight, 1 - dim).reason is not None:
            continue
        group = graph.groups[int(numbers[0])].name
        if resolved.keeps.get(group) == () and (weight, group) not in told:
            found[layer] = _Sums(layer, group)
    return found


def _offset(layer: nn.Module, sums: _Sums, images: int) -> Tensor:
    """Return the constant inputs, `(C,)`, that give the mean output; near the mean input, which alone does not.

    At borders a padded layer reads less than elsewhere.
    """
    given, made = sums.given / images, sums.made / images
    weight, bias = layer.get_parameter("weight").detach().double().cpu(), getattr(layer, "bias", None)
    if bias is not None:
        made = made - bias.detach().double().cpu()
    taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    if taps.size(1) != len(given):  # a grouped layer
        return given
    missing: Tensor = torch.linalg.pinv(taps, rtol=_RANK) @ (made - taps @ given)
    return given + missing
