"""What a network's outputs lose when one channel group alone is narrowed and what reads it is refitted: measured.

What is foreseen of a layer (`prunekit.restoration.second_moments`) stops at the layers behind it. How much of that
reaches the outputs differs by layer, in a ResNet-20 by a factor of three; here the network is pruned, refitted and run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunekit.errors import InputError
from prunekit.plan import Keep, Plan
from prunekit.restoration.calibration import calibrate
from prunekit.restoration.images import Inputs, bytes_per_image, in_batches, tensors_of
from prunekit.restoration.memory import MEMORY, read_memory
from prunekit.surgery import ChannelGroup, Graph, edit
from prunekit.surgery.copying import copied
from prunekit.surgery.graph.blocks import ResidualBlock
from prunekit.surgery.ops import LAYER_OPS

IMAGES = 128
"""How many images serve at most: every other one to refit to, the rest to measure on."""

_ROWS = 8000  # positions that a layer is refitted at: its inputs are those of the original, so that few are enough
_BATCH = 64


class NarrowedAlone:
    """A network of which one group at a time is narrowed, and compared with itself on images."""

    def __init__(self, model: nn.Module, graph: Graph, images: Tensor | Inputs, memory: str | int = MEMORY) -> None:
        """Run the network on the first of some normalised images, `(N, C, H, W)`.

        Raises:
            InputError: Its outputs cannot be compared.
        """
        chosen = images[:IMAGES]
        self._model, self._graph = copied(model).eval(), graph
        self._fitted, self._measured = chosen[::2], chosen[1::2]
        self._memory = read_memory(memory)
        self._original = self._outputs(self._model)
        if not self._original:
            raise InputError("the network gives no numbers for each image that could be compared")

    def network(self, group: ChannelGroup, kept: Sequence[int]) -> nn.Module:
        """Return a copy with the `kept` units of a group, and the layers that read them refitted where they can be."""
        return self._refitted(Keep(group.name, sorted(kept)), {member.module for member in group.consumers})

    def without(self, block: ResidualBlock) -> nn.Module:
        """Return a copy without a residual block, and as many layers behind it refitted as have gone with it."""
        calls = [node for node in self._graph.nodes if node.read is not None and node.op in LAYER_OPS]
        gone = sum(block.module in node.modules for node in calls)
        behind = [node.read.parameter.rpartition(".")[0] for node in calls if node.read and node.index > block.sum]
        return self._refitted(Keep(block.cuts[-1], ()), set(behind[:gone]))

    def _refitted(self, keep: Keep, layers: set[str]) -> nn.Module:
        plan, memory = Plan([keep]), self._memory
        plan = calibrate(self._model, self._graph, plan, self._fitted, rows=_ROWS, memory=memory, layers=layers)
        return edit(self._model, plan, self._graph).eval()

    def loss(self, network: nn.Module) -> float:
        """Return the error of a network's outputs, as a share of the variance of the original's over images."""
        errors = [_share(now, was) for now, was in zip(self._outputs(network), self._original, strict=True)]
        return sum(errors) / len(errors)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        """Return each output over all images that are measured on."""
        size = max(1, min(_BATCH, self._memory // 4 // bytes_per_image(self._graph)))
        with torch.no_grad():
            parts = [_numbers(model(*tensors_of(batch))) for batch in in_batches(self._measured, size)]
        return [torch.cat(leaves).double() for leaves in zip(*parts, strict=True)]


def _numbers(outputs: object) -> list[Tensor]:
    return [
        leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim()
    ]


def _share(now: Tensor, was: Tensor) -> float:
    """Return the squared error of an output `(N, ...)` as a share of its variance over images."""
    variance = (was - was.mean(0)).square().sum()
    return float((now - was).square().sum() / variance.clamp_min(1e-30))
