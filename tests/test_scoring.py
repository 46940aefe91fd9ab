"""`plan_by_scores`: any score becomes a plan that meets any budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import prunekit as pk

MODEL = pk.load("prunekit:resnet20")
GRAPH = pk.inspect(MODEL).graph
WHOLE = pk.inspect(MODEL).cost


def ascending() -> dict[str, NDArray[np.float64]]:
    """Scores by which the first channels of each group go first."""
    return {group.name: np.arange(group.size, dtype=float) for group in GRAPH.groups}


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"target_macs": "50%"}, lambda cost: 0.45 < cost.macs / WHOLE.macs <= 0.5),
        ({"target_params": "30%"}, lambda cost: 0.25 < cost.params / WHOLE.params <= 0.3),
        ({"ratio": 0.25}, lambda cost: cost.channels < WHOLE.channels),
    ],
)
def test_budgets_are_met(settings: dict[str, Any], left: Any) -> None:
    plan = pk.plan_by_scores(GRAPH, ascending(), pk.Config(**settings))
    assert left(pk.inspect(pk.apply(MODEL, plan)).cost)


def test_the_lowest_scores_go() -> None:
    plan = pk.plan_by_scores(GRAPH, ascending(), pk.Config(ratio={"layer1.0.conv1": 0.5}))
    assert plan.keeps == (pk.Keep("layer1.0.conv1", range(8, 16)),)


def test_widths_are_multiples_and_no_layer_gets_too_narrow() -> None:
    plan = pk.plan_by_scores(GRAPH, ascending(), pk.Config(ratio=0.5, round_to=4))
    assert {len(keep.index) % 4 for keep in plan.keeps} == {0}
    plan = pk.plan_by_scores(GRAPH, ascending(), pk.Config(ratio=0.9, min_channels=5))
    assert min(len(keep.index) for keep in plan.keeps) >= 5
    assert plan.notes["protected"]


def test_groups_without_scores_and_infinite_scores_stay() -> None:
    scores = ascending()
    del scores["layer1.0.conv1"]
    scores["layer1.1.conv1"][:] = np.inf
    plan = pk.plan_by_scores(GRAPH, scores, pk.Config(ratio=0.5))
    assert not {"layer1.0.conv1", "layer1.1.conv1"} & {keep.group for keep in plan.keeps}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of --ratio"),
        ({"ratio": 0.5, "target_macs": "50%"}, "exactly one of --ratio"),
        ({"target_macs": "1%", "min_channels": 8}, "cannot be met"),
        ({"ratio": 1e-4}, "too small to remove"),
        ({"ratio": {"fc": 0.5}}, "cannot be pruned"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pk.InputError, match=message):
        pk.plan_by_scores(GRAPH, ascending(), pk.Config(**settings))


def test_nothing_to_prune_is_said() -> None:
    single = nn.Sequential(nn.Conv2d(3, 8, 3))
    graph = pk.inspect(single, torch.zeros(1, 3, 8, 8)).graph
    with pytest.raises(pk.InputError, match="nothing in this model can be pruned"):
        pk.plan_by_scores(graph, {}, pk.Config(ratio=0.5))
    with pytest.raises(pk.InputError, match="no channel group has scores"):
        pk.plan_by_scores(pk.inspect(nn.Sequential(nn.ReLU()), torch.zeros(1, 3)).graph, {}, pk.Config(ratio=0.5))
