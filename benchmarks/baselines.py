"""The published data-free ways that `merging.py` stands beside, written from their papers' formulas.

- LBYL (Lee, Kim and Choi, arXiv 2502.08474): each removed filter, in the scale that batch norm gives it, is a ridge
  combination of *all* kept ones; the combination of their constants counts as well, and large coefficients are damped.
- Model Folding (Wang et al., ICLR 2025): k-means over the filters in that scale; each cluster becomes its mean, the
  next layer adds up what read its members, and the variance that averaging takes away is given back from the mean
  correlation within the cluster (the data-free Fold-AR).

Both see the layers and widths that `prunekit merge` would narrow: convolution, batch norm, ReLU, next layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit import Fold, Graph, Keep, Plan, Refit

RIDGE = 0.01  # of the mean square of the filters' norms
CONSTANTS = 1.0  # weight of the constants' error; of eight pairs the one with the least error on training images


def lbyl(model: nn.Module, graph: Graph, keeps: dict[str, list[int]]) -> Plan:
    """Folds that express each removed channel by all kept ones; selection is the caller's."""
    operations: list[Keep | Fold | Refit] = [Keep(name, index) for name, index in keeps.items()]
    for name, kept in keeps.items():
        filters, constants, _ = _scaled(model, graph, name)
        gone = sorted(set(range(len(filters))) - set(kept))
        system = filters[kept] @ filters[kept].t() + CONSTANTS * torch.outer(constants[kept], constants[kept])
        wanted = filters[kept] @ filters[gone].t() + CONSTANTS * torch.outer(constants[kept], constants[gone])
        penalty = RIDGE * filters.square().sum(1).mean()
        matrix = torch.linalg.solve(system + penalty * torch.eye(len(kept), dtype=system.dtype), wanted).t()
        operations += _folds(graph, name, matrix)
    return Plan(operations)


def folding(model: nn.Module, graph: Graph, keeps: dict[str, list[int]], seed: int = 0) -> Plan:
    """As many clusters as `keeps` says, each in the place of its first member."""
    operations: list[Keep | Fold | Refit] = []
    for name, kept in keeps.items():
        filters, constants, beta = _scaled(model, graph, name)
        cluster = _k_means(torch.cat([filters, constants[:, None]], 1), len(kept), seed)
        index = sorted(int((cluster == c).nonzero()[0]) for c in cluster.unique())
        gone = sorted(set(range(len(filters))) - set(index))
        matrix = (cluster[gone][:, None] == cluster[index][None, :]).double()
        operations += [Keep(name, index), *_folds(graph, name, matrix)]
        operations += _averaged(model, graph, name, filters, constants, beta, [cluster == cluster[i] for i in index])
    return Plan(operations)


def _averaged(
    model: nn.Module,
    graph: Graph,
    name: str,
    filters: Tensor,
    constants: Tensor,
    beta: Tensor,
    members: list[Tensor],
) -> list[Keep | Fold | Refit]:
    """Each cluster's mean filter, and a batch norm that gives it back its members' variance."""
    layer: Any = model.get_submodule(name)
    norm: Any = model.get_submodule(graph.batch_norm_after(name) or "")
    weight = torch.stack([filters[m].mean(0) for m in members])
    stretch = torch.tensor([_stretch(filters[m]) for m in members])
    values = {
        "weight": stretch,
        "bias": torch.stack([beta[m].mean() for m in members]),
        "running_mean": torch.stack([(beta[m] - constants[m]).mean() for m in members]),
        "running_var": torch.full((len(members),), 1 - norm.eps, dtype=torch.float64),
    }
    shape = (len(members), *layer.weight.shape[1:])
    normed = Refit(graph.batch_norm_after(name) or "", {key: value.float() for key, value in values.items()})
    return [Refit(name, {"weight": weight.reshape(shape).float()}), normed]


def _stretch(filters: Tensor) -> float:
    """`1 / sqrt((1 + (N - 1) c) / N)` with `c` the mean correlation of two members."""
    number = len(filters)
    if number == 1:
        return 1.0
    unit = filters / filters.norm(dim=1, keepdim=True).clamp_min(1e-12)
    common = float((unit @ unit.t()).sum() - number) / (number * (number - 1))
    return float(((1 + (number - 1) * max(common, 0.0)) / number) ** -0.5)


def _scaled(model: nn.Module, graph: Graph, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Filters `(C, fan-in)` and constants `(C,)` with batch norm multiplied in, and its shift."""
    layer: Any = model.get_submodule(name)
    norm: Any = model.get_submodule(graph.batch_norm_after(name) or "")
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    beta = norm.bias.detach().double()
    return layer.weight.detach().double().flatten(1) * scale[:, None], beta - norm.running_mean * scale, beta


def _folds(graph: Graph, name: str, matrix: Tensor) -> list[Fold]:
    group = graph.group(name)
    return [Fold(member.module, group.name, matrix=matrix) for member in group.consumers]


def _k_means(points: Tensor, clusters: int, seed: int, rounds: int = 30) -> Tensor:
    """Lloyd's algorithm from k-means++ starts; the cluster of each point."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < clusters:
        distance = torch.cdist(points, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, points[torch.multinomial(distance, 1, generator=generator)]])
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        for c in range(clusters):
            if not bool((nearest == c).any()):  # the point that is worst off in a larger cluster starts anew
                shared = torch.bincount(nearest, minlength=clusters)[nearest] > 1
                nearest[torch.where(shared, (points - centres[nearest]).norm(dim=1), -1.0).argmax()] = c
        centres = torch.stack([points[nearest == c].mean(0) for c in range(clusters)])
    return nearest
