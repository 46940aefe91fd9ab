"""Ops and labels: what is carried, and what freezes which channels, said with the op and the module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import lively, random_plan
from prunekit import surgery

X = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


class Between(nn.Module):
    """A convolution, something, a convolution, and another one for the output."""

    def __init__(self, something: Callable[[Tensor], Tensor], inputs: int = 8) -> None:
        super().__init__()
        self.something = something
        self.before, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.after, self.out = nn.Conv2d(inputs, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.something(self.norm(self.before(x)))
        return self.out(torch.relu(self.after(x)))


CARRIED = {
    "relu6": F.relu6,
    "in-place": lambda x: F.silu(x, inplace=True),
    "scale by position": lambda x: x * torch.linspace(0, 1, 8, dtype=x.dtype, device=x.device),
    "normalise by position": lambda x: x / (1 + x.abs().amax((2, 3), keepdim=True)),
    "roll positions": lambda x: torch.roll(x, (1, 2), (2, 3)),
    "flip positions": lambda x: x.flip(3),
    "pad positions": lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "strided positions": lambda x: x[:, :, ::2, 1::2],
    "channels last and back": lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2),
    "flatten positions and back": lambda x: x.flatten(2).view(*x.shape),
    "upsample": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(5, 5), mode="bilinear"),
    "pool": lambda x: F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 2),
    "sum of halves": lambda x: sum(x.chunk(2, 1)).repeat(1, 1, 1, 1).expand(*x.chunk(2, 1)[0].shape),
    "softmax over positions": lambda x: x.flatten(2).softmax(-1).view(*x.shape),
    "running sum over positions": lambda x: x.cumsum(3),
    "stack and mean": lambda x: torch.stack([x, x.relu()]).mean(0),
    "glu": lambda x: F.glu(x, 1),
    "spatial gate": lambda x: x * x.new_ones(1, 1, 8, 8),
}


@pytest.mark.parametrize("name", CARRIED)
def test_channels_are_carried(name: str) -> None:
    inputs = 4 if name in ("sum of halves", "glu") else 8
    model = lively(Between(CARRIED[name], inputs))
    graph = surgery.trace(model, X)
    assert len(graph.group("before").free) == inputs
    for seed in range(3):
        plan = random_plan(graph, seed)
        surgery.verify(model, surgery.edit(model, plan, graph), plan, graph)


FROZEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "mean over channels": (lambda x: x * x.mean(1, keepdim=True), "'mean' across channels"),
    "softmax over channels": (lambda x: x.softmax(1), "'_softmax' across channels"),
    "running sum over channels": (lambda x: x.cumsum(1), "'cumsum' across channels"),
    "picked channel": (lambda x: x + x[:, 3:4], "a slice of channels with fixed bounds"),
    "chosen channel": (lambda x: x + x[:, 3].unsqueeze(1), "a channel picked by its number"),
    "rolled channels": (lambda x: torch.roll(x, 1, 1), "a roll of channels"),
    "every other channel": (lambda x: x[:, ::2].repeat(1, 2, 1, 1), "a strided slice of channels"),
    "constant per channel": (
        lambda x: x * torch.linspace(0, 1, 8, dtype=x.dtype, device=x.device).view(1, 8, 1, 1),
        "values that have fixed channels",
    ),
    "sorted": (lambda x: x.sort(1).values, "the operation 'sort'"),
    "products of channels": (
        lambda x: torch.bmm(x.flatten(2).softmax(-1), x.flatten(2).transpose(1, 2)).sum((1, 2)).view(-1, 1, 1, 1) * x,
        "the operation 'bmm'",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_needs_all_channels_freezes_them_with_the_reason(name: str) -> None:
    something, reason = FROZEN[name]
    model = lively(Between(something))
    graph = surgery.trace(model, X)
    assert reason in str(graph.group("before").reason)
    assert len(graph.group("after").free) == 4
    plan = random_plan(graph, 1)
    surgery.verify(model, surgery.edit(model, plan, graph), plan, graph)


def test_a_forward_that_needs_values_is_recorded_on_real_tensors() -> None:
    def branch(x: Tensor) -> Tensor:
        return x.relu() if x.new_ones(()).item() > 0 else x

    graph = surgery.trace(lively(Between(branch)), X)
    assert len(graph.group("before").free) == 8


def test_dictionaries_and_tuples_are_outputs_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> dict[str, object]:
            x = torch.relu(self.a(x))
            return {"first": (self.b(x), None), "second": [self.c(x)]}

    model = lively(Two())
    graph = surgery.trace(model, X)
    assert [graph.group(name).reason for name in "bc"] == ["the model's output"] * 2
    plan = random_plan(graph, 2)
    surgery.verify(model, surgery.edit(model, plan, graph), plan, graph)


def test_the_callers_model_is_not_touched_by_tracing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    surgery.trace(model, X.float())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
