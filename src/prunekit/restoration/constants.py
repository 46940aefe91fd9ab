"""Constant absorption: a channel whose gamma is (nearly) zero still passes on a constant, and the next layer keeps it.

With all batch-norm scales of a removed channel at zero, what reaches a consumer no longer depends on the input: it is
`act(beta)`, through whatever stands between. So it is read off by running the network once, which holds for residual
sums, any activation, pooling and depthwise convolutions alike. Where it still depends on the input (an element-wise
gate, a branch without batch norm) there is no constant, and the channel is dropped plainly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.plan import Fold
from prunekit.surgery import Graph
from prunekit.surgery.copying import aliases, copied, named_tensors
from prunekit.surgery.editing.carriers import CarrierFinder
from prunekit.surgery.execution.dispatch import unfused_attention
from prunekit.surgery.execution.draws import Draws, own_randomness
from prunekit.surgery.execution.sources import random_inputs
from prunekit.surgery.execution.weights import FollowWeights, Key
from prunekit.surgery.graph.labels import Ids, Mask
from prunekit.surgery.ops import Reading, is_batch_norm

_STEADY = 1e-4  # how much a "constant" may move with the input, relative to 1 + its size
_BATCH = 2


@dataclass(frozen=True)
class Constants:
    """Folds of what removed channels are worth; `lost` says which readers of theirs cannot take it over, and why."""

    folds: tuple[Fold, ...]
    lost: Mapping[str, str]


def constant_folds(model: nn.Module, graph: Graph, keeps: Mapping[str, Sequence[int]]) -> Constants:
    """Return a fold with `A = 0`, `b` = the constant of each removed input, for every consumer that loses inputs.

    Where an operation cannot carry a constant (`surgery/carriers.py`), no fold is claimed.
    """
    kept = graph.kept_classes(keeps)
    groups = _losing(graph, keeps, kept)
    gone = {key: (~kept[graph.slots[key]]).nonzero()[0] for key in groups}
    found = _input_constants(_silenced(model, graph, kept), graph, gone, kept)
    carriers, folds, lost = CarrierFinder(model, graph), [], {}
    for key, group in groups.items():
        offset = found.get(key)
        if offset is None or not bool((offset != 0).any()):
            continue
        consumer, reason = graph.address(key[0]), carriers.of(*key).reason
        if reason is None and sum(groups[other] == group for other in groups if other[0] == key[0]) > 1:
            reason = "it reads the same channels through both dimensions of its weight"
        if reason is None:
            folds.append(Fold(consumer, group, offset=offset))
        else:
            lost[consumer] = reason
    return Constants(tuple(folds), lost)


def _losing(graph: Graph, keeps: Mapping[str, Sequence[int]], kept: Mask) -> dict[Key, str]:
    """Return the weights through which removed channels are read, and one of the groups that each loses some of."""
    read = {(node.read.parameter, node.read.dim) for node in graph.nodes if node.read is not None}
    losing = {key: (~kept[graph.slots[key]]).nonzero()[0] for key in sorted(read & graph.slots.keys())}
    losing = {key: gone for key, gone in losing.items() if gone.size}
    found: dict[Key, str] = {}
    for name in keeps:
        group = graph.group(name)
        for member in group.consumers:
            if (member.parameter, member.dim) in losing and not kept[graph.slots[member.parameter, member.dim]][
                member.positions
            ].all():
                found.setdefault((member.parameter, member.dim), name)
    for key, gone in losing.items():
        found.setdefault(key, graph.groups[int(graph.group_of[graph.slots[key][gone[0]]])].name)
    return found


def _silenced(model: nn.Module, graph: Graph, kept: Mask) -> nn.Module:
    """Return a copy in which every batch norm multiplies the removed channels by zero."""
    tensors = named_tensors(model)
    replaced: dict[int, Any] = dict(aliases(model))
    for node in graph.nodes:
        if not is_batch_norm(node.op) or not node.parameters or node.parameters[0] not in graph.parameters:
            continue
        scale = tensors[node.parameters[0]]
        classes = graph.slots.get((node.parameters[0], 0))
        if classes is not None and not kept[classes].all():
            gone = torch.from_numpy((~kept[classes]).nonzero()[0]).to(scale.device)
            replaced[id(scale)] = nn.Parameter(scale.detach().index_fill(0, gone, 0.0))
    return copied(model, replaced).eval()


def _input_constants(model: nn.Module, graph: Graph, gone: Mapping[Key, Ids], kept: Mask) -> dict[Key, Tensor]:
    """Return, for each weight, the constants of removed channels read through it, zero where these follow the input.

    Each has an entry for every channel of the activation, in double precision. Two runs on the example's own shapes
    tell what follows the input: an input may be a list of images.
    """
    device = next(model.parameters()).device
    runs = []
    for seed in range(2):
        mode = _ReadConstants(model, gone, Draws(graph.draws, kept, device))
        with torch.inference_mode(False), torch.no_grad(), own_randomness(device), unfused_attention(), mode:
            model(*random_inputs(graph.example, device, seed))
        runs.append(mode)
    first, second = runs
    found = {}
    for key, values in first.found.items():
        others = second.found.get(key, [])
        if len(others) == len(values):
            removed = first.removed[key]
            found[key] = torch.zeros(removed.numel(), dtype=torch.float64)
            found[key][removed] = _common([_constant(a, b) for a, b in zip(values, others, strict=True)])
    return found


class _ReadConstants(FollowWeights):
    """Mode that notes what removed channels are where they are read: for each call `(channels, places)`.

    `removed` tells which channels of the activation these are.
    """

    def __init__(self, model: nn.Module, gone: Mapping[Key, Ids], draws: Draws) -> None:
        super().__init__(model, gone, draws)
        self.found: dict[Key, list[Tensor]] = {}
        self.removed: dict[Key, Tensor] = {}
        self._gone = gone

    def read(
        self,
        func: Any,  # noqa: ARG002
        reading: Reading,
        args: Any,
        key: Key,
        line: Tensor,
    ) -> tuple[Any, Tensor | None]:
        """Note what the removed channels are where an op reads them."""
        x, width = args[reading.activation], line.numel()
        removed = torch.isin(line, torch.from_numpy(self._gone[key])).repeat(x.size(reading.channels) // width)
        self.removed[key] = removed
        taken = x.detach().index_select(reading.channels, removed.nonzero()[:, 0].to(x.device))
        self.found.setdefault(key, []).append(taken.movedim(reading.channels, 0).flatten(1))
        return args, None


def _constant(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of each row of what was read in two runs, zero where it differs between them."""
    a, b = a.double(), b.double()
    if a.shape == b.shape:
        moves = (a - b).abs().amax(1)
    else:  # as many regions as were found, say: nothing but equal numbers everywhere is a constant
        both = torch.cat([a, b], 1)
        moves = both.amax(1) - both.amin(1)
    mean = (a.mean(1) + b.mean(1)) / 2
    return torch.where(moves <= _STEADY * (1 + mean.abs()), mean, 0.0).cpu()


def _common(constants: Sequence[Tensor]) -> Tensor:
    """Return what all calls of a layer agree on, zero elsewhere."""
    first = constants[0]
    same = torch.stack([one == first for one in constants]).all(0)
    return torch.where(same, first, 0.0)
