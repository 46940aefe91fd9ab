"""Constant absorption: a channel whose gamma is (nearly) zero still passes on a constant, and the next layer keeps it.

With all batch-norm scales of a removed channel at zero, what reaches a consumer no longer depends on the input: it is
`act(beta)`, through whatever stands between. So it is read off by running the network once, which holds for residual
sums, any activation, pooling and depthwise convolutions alike. Where it still depends on the input (an element-wise
gate, a branch without batch norm) there is no constant, and the channel is dropped plainly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.plan import Fold
from prunekit.surgery import Graph
from prunekit.surgery.copying import copied
from prunekit.surgery.labels import Ids
from prunekit.surgery.verify import random_inputs

_STEADY = 1e-4  # how much a "constant" may move with the input, relative to 1 + its size


def constant_folds(model: nn.Module, graph: Graph, keeps: Mapping[str, Sequence[int]]) -> list[Fold]:
    """A fold with `A = 0`, `b` = the constant of each removed input, for every consumer that loses inputs."""
    kept = graph.kept_classes(keeps)
    silent = _silenced(model, {key: (~kept[classes]).nonzero()[0] for key, classes in graph.slots.items()})
    lost = _lost_inputs(graph, keeps)
    means = _input_constants(silent, graph, list(lost))
    folds = []
    for consumer, (group, width, positions) in lost.items():
        constant = means.get(consumer)
        if constant is None:
            continue
        offset = torch.zeros_like(constant)
        for start in range(0, constant.numel(), width):  # a grouped convolution reads the same places of each group
            offset[positions + start] = constant[positions + start]
        if bool((offset != 0).any()):
            folds.append(Fold(consumer, group, offset=offset))
    return folds


def _lost_inputs(graph: Graph, keeps: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, int, Tensor]]:
    """For each consumer that loses inputs: one group that it reads, its inputs' number, and the places that go."""
    found: dict[str, tuple[str, int, list[Tensor]]] = {}
    for name, kept in keeps.items():
        stays = set(kept)
        for member in graph.group(name).consumers:
            gone = [int(p) for p, u in zip(member.positions, member.units, strict=True) if int(u) not in stays]
            if gone:
                width = graph.shapes[member.parameter][member.dim]
                found.setdefault(member.module, (name, width, []))[2].append(torch.tensor(gone))
    return {consumer: (group, width, torch.cat(parts)) for consumer, (group, width, parts) in found.items()}


def _silenced(model: nn.Module, gone: Mapping[tuple[str, int], Ids]) -> nn.Module:
    """A copy in which every batch norm multiplies the removed channels by zero."""
    silent = copied(model).eval()
    for name, module in silent.named_modules():
        if isinstance(module, _BatchNorm) and module.weight is not None:
            removed = gone.get((f"{name}.weight" if name else "weight", 0))
            if removed is not None and removed.size:
                module.weight.data[torch.from_numpy(removed).to(module.weight.device)] = 0.0
    return silent


def _input_constants(model: nn.Module, graph: Graph, consumers: Sequence[str]) -> dict[str, Tensor]:
    """For each consumer the mean of every input channel (feature), zero where it follows the input."""
    means: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().double()
            channels = x.dim() - 1 if isinstance(module, nn.Linear) else 1
            x = x.movedim(channels, 0).flatten(2) if x.dim() > 2 else x.t().unsqueeze(-1)  # (C, N, positions)
            mean = x.mean((1, 2))
            moves = (x - x[:, :1]).abs().amax((1, 2))
            steady = moves <= _STEADY * (1 + mean.abs())
            constant = torch.where(steady, mean, torch.zeros_like(mean)).cpu()
            means[name] = constant if name not in means else torch.where(means[name] == constant, constant, 0.0)

        return hook

    modules = dict(model.named_modules())
    handles = [modules[c].register_forward_pre_hook(note(c, modules[c])) for c in consumers]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(*random_inputs(graph.example, device, seed=0, batch=2))
    finally:
        for handle in handles:
            handle.remove()
    return means
