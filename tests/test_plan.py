"""Plans: what they may say about a network, and their JSON."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import prunekit as pk
from prunekit import models
from prunekit.errors import SurgeryError
from prunekit.plan import Fold, Keep, Plan, Refit

X = torch.zeros(1, 3, 8, 8)


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 64, 2),
    ).eval()


def test_a_plan_by_hand_gives_a_smaller_model_and_leaves_the_original_alone() -> None:
    model = small_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = pk.apply(model, Plan([Keep("0", [0, 2, 5])]), X)
    assert small[0].out_channels == 3
    assert small[3].in_channels == 3
    assert torch.equal(small[0].weight, model[0].weight[[0, 2, 5]])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan([Keep("conv", [0])]), "unknown channel group 'conv'"),
        (Plan([Keep("0", [0]), Keep("0", [1])]), "twice"),
        (Plan([Keep("0", [0, 0])]), "twice"),
        (Plan([Keep("0", [6])]), "channels 0 to 5"),
        (Plan([Keep("0", [-1])]), "channels 0 to 5"),
        (Plan([Keep("0", [])]), "without a single channel"),
        (Plan([Keep("6", [0])]), "cannot be removed: the model's output"),
        (Plan([Keep("0", [0]), Fold("6", "0", offset=torch.ones(6))]), "does not read channel group"),
        (Plan([Keep("0", [0]), Fold("3", "0", matrix=torch.ones(2, 2))]), "need \\(5, 1\\)"),
        (Plan([Keep("0", [0]), Fold("3", "0", offset=torch.ones(4))]), "offset has 4"),
        (Plan([Refit("9", {"weight": torch.ones(1)})]), "does not have"),
        (Plan([Refit("3", {"bias": torch.ones(3)})]), "shape \\(3,\\)"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: Plan, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        pk.apply(small_net(), plan, X)


@given(st.sets(st.integers(0, 60)))
def test_the_structure_survives_json(index: set[int]) -> None:
    plan = Plan([Keep("a.b", sorted(index))], {"protected": ["a.b"]})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.keeps == plan.keeps
    assert again.notes == plan.notes


@pytest.mark.parametrize("method", ["slim", "merge"])
def test_a_replay_gives_the_same_weights_bit_for_bit(method: str) -> None:
    model = models.build("resnet20_cifar", {"shortcut": "conv"})
    result = pk.prune(method, model, ratio=0.4)
    again = pk.apply(model, result.plan)
    expected = result.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_a_constant_without_bias_or_batch_norm_gets_a_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    small = pk.apply(model, Plan([Keep("0", [0, 1]), Fold("1", "0", offset=torch.tensor([0.0, 0, 1, 2]))]), X)
    expected = model[1].weight[:, 2, 0, 0] + 2 * model[1].weight[:, 3, 0, 0]
    torch.testing.assert_close(small[1].bias.detach(), expected.detach())


def test_requires_grad_mode_dtype_and_tied_weights_survive() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.twice = nn.Conv2d(4, 4, 1)
            self.again = self.twice
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x))
            return self.head(torch.relu(self.again(torch.relu(self.twice(x)))))

    model = Tied().to(torch.bfloat16).train()
    model.first.weight.requires_grad_(False)
    graph = pk.inspect(model, X.to(torch.bfloat16)).graph
    assert graph.group("first") is graph.group("twice")  # a layer that reads its own output ties both sides
    small = pk.apply(model, Plan([Keep("first", [0, 3])]), X.to(torch.bfloat16))
    assert small.training
    assert small.twice is small.again
    assert small.twice.weight.shape == (2, 2, 1, 1)
    assert not small.first.weight.requires_grad
    assert small.head.weight.dtype is torch.bfloat16


def test_a_hard_coded_reshape_freezes_its_channels_with_the_module_named() -> None:
    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 1)
            self.fc = nn.Linear(6 * 64, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.conv(x)).view(-1, 6 * 64))

    reason = "'view' in Hard has sizes written into the code"
    assert pk.inspect(Hard().eval(), X).graph.group("conv").reason == reason
    with pytest.raises(SurgeryError, match=f"cannot be removed: {reason}"):
        pk.apply(Hard().eval(), Plan([Keep("conv", [0, 1])]), X)


def test_a_network_that_does_not_run_is_refused_with_the_module_named() -> None:
    model, plan = small_net(), Plan([Keep("0", [0, 1])])
    broken = pk.apply(model, plan, X)
    broken[3] = nn.Conv2d(5, 4, 3, padding=1).eval()
    with pytest.raises(SurgeryError, match="does not run: in '3'"):
        pk.verify(model, broken, plan, X)


def test_a_split_with_fixed_sizes_is_frozen_and_one_by_share_is_not() -> None:
    class Split(nn.Module):
        def __init__(self, fixed: bool) -> None:
            super().__init__()
            self.fixed = fixed
            self.conv = nn.Conv2d(3, 8, 1)
            self.left = nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.conv(x))
            a, b = y.split(4, 1) if self.fixed else y.chunk(2, 1)
            return self.left(a) + self.left(b)

    fixed = pk.inspect(Split(True).eval(), X).graph.group("conv")
    assert not fixed.free
    assert fixed.reason == "'split' in Split has sizes written into the code"
    shared = pk.inspect(Split(False).eval(), X).graph.group("conv")
    assert len(shared.free) == 4
