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
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.plan import Fold
from prunekit.restore.plain import takes_constants
from prunekit.surgery import Graph
from prunekit.surgery.copying import copied
from prunekit.surgery.labels import Ids
from prunekit.surgery.meta import DispatchMode, op_name
from prunekit.surgery.verify import random_inputs

_STEADY = 1e-4  # how much a "constant" may move with the input, relative to 1 + its size
# op: input, weight, channel dimension
_READERS = {"convolution": (0, 1, 1), "addmm": (1, 2, -1), "mm": (0, 1, -1)}


@dataclass(frozen=True)
class _Lost:
    """A consumer that loses inputs: one group that it reads, the places that go, and the number of its inputs."""

    group: str
    places: Tensor
    inputs: int


def constant_folds(model: nn.Module, graph: Graph, keeps: Mapping[str, Sequence[int]]) -> list[Fold]:
    """A fold with `A = 0`, `b` = the constant of each removed input, for every consumer that can take it over."""
    kept = graph.kept_classes(keeps)
    silent = _silenced(model, {key: (~kept[classes]).nonzero()[0] for key, classes in graph.slots.items()})
    lost = _lost_inputs(model, graph, keeps)
    means = _input_constants(silent, graph, lost)
    folds = []
    for consumer, one in lost.items():
        constant = means.get(consumer)
        if constant is not None and bool((constant != 0).any()):
            offset = constant.new_zeros(one.inputs)
            offset[one.places] = constant
            folds.append(Fold(consumer, one.group, offset=offset))
    return folds


def _lost_inputs(model: nn.Module, graph: Graph, keeps: Mapping[str, Sequence[int]]) -> dict[str, _Lost]:
    """The consumers that lose inputs and can take over what these were worth."""
    found: dict[str, tuple[str, int, list[Tensor]]] = {}
    for name, kept in keeps.items():
        stays = set(kept)
        for member in graph.group(name).consumers:
            gone = [int(p) for p, u in zip(member.positions, member.units, strict=True) if int(u) not in stays]
            if gone and takes_constants(model, graph, member):
                width = graph.shapes[member.parameter][member.dim]
                found.setdefault(member.module, (name, width, []))[2].append(torch.tensor(gone))
    lost = {}
    for consumer, (group, width, parts) in found.items():
        groups = getattr(model.get_submodule(consumer), "groups", 1)  # each reads the same places of its own inputs
        places = torch.cat([torch.cat(parts) + width * number for number in range(groups)])
        lost[consumer] = _Lost(group, places, width * groups)
    return lost


def _silenced(model: nn.Module, gone: Mapping[tuple[str, int], Ids]) -> nn.Module:
    """A copy in which every batch norm multiplies the removed channels by zero."""
    silent = copied(model).eval()
    for name, module in silent.named_modules():
        if isinstance(module, _BatchNorm) and module.weight is not None:
            removed = gone.get((f"{name}.weight" if name else "weight", 0))
            if removed is not None and removed.size:
                module.weight.data[torch.from_numpy(removed).to(module.weight.device)] = 0.0
    return silent


def _input_constants(model: nn.Module, graph: Graph, lost: Mapping[str, _Lost]) -> dict[str, Tensor]:
    """For each consumer the mean of every lost input, zero where it follows the network's input."""
    weights = {model.get_submodule(name).weight.data_ptr(): name for name in lost}  # type: ignore[operator]
    first, second = (_Readings(weights, lost) for _ in range(2))
    device = next(model.parameters()).device
    for seed, readings in enumerate((first, second)):
        with torch.no_grad(), readings:
            model(*random_inputs(graph.example, device, seed))
    return {
        name: _common([_constant(a, b) for a, b in zip(values, second.found[name], strict=False)])
        for name, values in first.found.items()
        if len(second.found.get(name, ())) == len(values)
    }


def _constant(a: Tensor, b: Tensor) -> Tensor:
    """The mean of each row of what was read in two runs, zero where it differs between them."""
    a, b = a.double(), b.double()
    if a.shape == b.shape:
        moves = (a - b).abs().amax(1)
    else:  # as many regions as were found, say: nothing but equal numbers everywhere is a constant
        both = torch.cat([a, b], 1)
        moves = both.amax(1) - both.amin(1)
    mean = (a.mean(1) + b.mean(1)) / 2
    return torch.where(moves <= _STEADY * (1 + mean.abs()), mean, 0.0).cpu()


def _common(constants: Sequence[Tensor]) -> Tensor:
    """What all calls of a layer agree on, zero elsewhere."""
    first = constants[0]
    same = torch.stack([one == first for one in constants]).all(0)
    return torch.where(same, first, 0.0)


class _Readings(DispatchMode):
    """What the ops that read some weights find on their lost inputs: for each call `(lost, positions)`.

    Read where the op runs, however it was called: a module's forward may be given its input by name, or not be called.
    """

    def __init__(self, weights: Mapping[int, str], lost: Mapping[str, _Lost]) -> None:
        super().__init__()
        self.found: dict[str, list[Tensor]] = {}
        self._weights = weights
        self._lost = lost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and keep what it reads if it is one of these."""
        if op_name(func) in _READERS:
            x, weight, channels = _READERS[op_name(func)]
            name = self._weights.get(args[weight].data_ptr())
            if name is not None and args[x].numel():
                rows = args[x].movedim(channels, 0).flatten(1)
                self.found.setdefault(name, []).append(rows[self._lost[name].places.to(rows.device)])
        return func(*args, **(kwargs or {}))
