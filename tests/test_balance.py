"""Networks that cut and shuffle their channels: parts keep equally many, of the right kinds, at any width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

import prunekit
from networks import ShuffleUnit, lively, random_plan
from prunekit import surgery
from prunekit.plan import Keep, Plan

X = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


def shuffled(units: int = 4, width: int = 16) -> nn.Module:
    """A stem, some units of ShuffleNetV2, a head."""

    def body() -> nn.Module:
        half = width // 2
        layers = [nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(half, half, 3, padding=1, groups=half), nn.Conv2d(half, half, 1))

    stem = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
    torch.manual_seed(1)
    return lively(nn.Sequential(*stem, *(ShuffleUnit(body()) for _ in range(units)), *tail))


@pytest.mark.parametrize("share", [0.2, 0.4, 0.5, 0.6, 0.8])
def test_every_width_is_proven(share: float) -> None:
    model = shuffled()
    graph = surgery.trace(model, X)
    assert graph.balancer is not None
    chance = np.random.default_rng(0)
    scores = {group.name: chance.random(group.size) for group in graph.groups}
    keeps = {g.name: np.argsort(-scores[g.name])[: max(1, round(share * g.size))].tolist() for g in graph.groups[:-1]}
    even = surgery.balanced(graph, keeps, scores)
    plan = Plan([Keep(name, index) for name, index in even.items()])
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) <= 1e-10
    assert small[0].out_channels == pytest.approx(16 * share, abs=2)
    predicted, real = surgery.predict(graph, graph.kept_classes(even)), surgery.measure(small, X)
    assert (predicted.params, predicted.macs, predicted.channels) == (real.params, real.macs, real.channels)


def test_a_pruned_shuffle_network_is_pruned_again() -> None:
    model = shuffled()
    for seed in range(2):
        graph = surgery.trace(model, X)
        plan = random_plan(graph, seed, most=0.5)
        small = surgery.edit(model, plan, graph)
        surgery.verify(model, small, plan, graph)
        model = small


def test_an_unbalanced_plan_gets_the_width_that_holds_it() -> None:
    """All channels that go are of one half: the network cannot be narrower, and the gaps hold zeros."""
    model = shuffled()
    graph = surgery.trace(model, X)
    plan = Plan([Keep("0", range(8))])
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) <= 1e-10
    assert small[0].out_channels >= 8


def test_a_fixed_halving_falls_back_to_what_runs() -> None:
    """A shuffle whose sizes are written into the code cannot be narrowed: its channels stay."""

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 2, 8, *x.shape[2:]).transpose(1, 2).reshape(-1, 16, *x.shape[2:])

    model = shuffled(2)
    model.insert(4, Fixed())
    graph = surgery.trace(model, X)
    assert graph.group("0").reason is not None
    plan = random_plan(graph, 0)
    surgery.verify(model, surgery.edit(model, plan, graph), plan, graph)


def test_groups_of_shufflenet_are_not_one_channel() -> None:
    model = lively(torchvision.models.shufflenet_v2_x0_5(weights=None)).float()
    x = torch.zeros(1, 3, 64, 64)
    graph = surgery.trace(model, x)
    assert len(graph.group("stage2.0.branch1.2").free) == 24
    small, plan = prunekit.slim(model, x, ratio=0.5)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    assert small.stage4[0].branch2[5].out_channels < 70
    assert plan.keeps
