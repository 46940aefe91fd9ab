"""Layers and idioms, one by one: each is pruned and proven, or left alone with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import lively, random_plan
from prunekit import surgery
from prunekit.plan import Keep, Plan

X = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


def prove(model: nn.Module, x: Any = X) -> surgery.Graph:
    """Every random plan is proven and costs what was foretold; the graph."""
    model = lively(model)
    graph = surgery.trace(model, x)
    for seed in range(3):
        plan = random_plan(graph, seed)
        small = surgery.edit(model, plan, graph)
        assert surgery.verify(model, small, plan, graph) <= 1e-10
        foretold = surgery.predict(graph, surgery.resolve(graph, plan).kept)
        real = surgery.measure(small, x)
        assert (foretold.params, foretold.macs) == (real.params, real.macs)
    return graph


class Run(nn.Module):
    """Layers by name, and a forward that is given them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._run = forward

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)


def head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


PRUNED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "PReLU, a slope a channel": (lambda: nn.Sequential(conv(3, 8), nn.PReLU(8), head(8)), 8),
    "PReLU, one slope": (lambda: nn.Sequential(conv(3, 8), nn.PReLU(), head(8)), 8),
    "GroupNorm": (lambda: nn.Sequential(conv(3, 12), nn.GroupNorm(3, 12), nn.ReLU(), head(12)), 4),
    "GroupNorm of one group": (lambda: nn.Sequential(conv(3, 12), nn.GroupNorm(1, 12), nn.ReLU(), head(12)), 12),
    "GroupNorm without a scale": (
        lambda: nn.Sequential(conv(3, 12), nn.GroupNorm(2, 12, affine=False), nn.SiLU(), head(12)),
        6,
    ),
    "InstanceNorm": (lambda: nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), head(8)), 8),
    "InstanceNorm without a scale": (lambda: nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8), nn.ReLU(), head(8)), 8),
    "grouped": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), head(12)), 2),
    "depthwise": (lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=8), nn.SiLU(), head(8)), 8),
    "depthwise with a multiplier": (lambda: nn.Sequential(conv(3, 8), conv(8, 16, groups=8), nn.SiLU(), head(16)), 8),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2), nn.BatchNorm2d(8), head(8)), 8),
    "transposed, grouped": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), nn.SiLU(), head(12)),
        4,
    ),
    "transposed, depthwise": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 2, groups=8), nn.SiLU(), head(8)),
        8,
    ),
    "transposed, depthwise with a multiplier": (
        lambda: nn.Sequential(conv(3, 4), nn.ConvTranspose2d(4, 8, 2, groups=4), nn.SiLU(), head(8)),
        4,
    ),
    "Softplus, which is not zero at zero": (lambda: nn.Sequential(conv(3, 8), nn.Softplus(), head(8)), 8),
    "dropout of channels": (lambda: nn.Sequential(conv(3, 8), nn.Dropout2d(0.5), nn.ReLU(), head(8)), 8),
    "called twice": (
        lambda: Run(
            lambda m, x: m.out(F.relu(m.twice(F.relu(m.twice(m.first(x)))))),
            **{"first": conv(3, 8), "twice": conv(8, 8), "out": head(8)},
        ),
        8,
    ),
    "called on two streams": (
        lambda: Run(
            lambda m, x: m.out(m.shared(m.left(x)) + m.shared(m.right(x)).tanh()),
            **{"left": conv(3, 8), "right": conv(3, 8), "shared": conv(8, 6), "out": head(6)},
        ),
        8,
    ),
    "concatenated with itself": (
        lambda: Run(lambda m, x: m.out(torch.cat([y := m.first(x), y.relu(), y], 1)), first=conv(3, 8), out=head(24)),
        8,
    ),
    "a parameter as layer scale": (
        lambda: Run(
            lambda m, x: m.out(F.gelu(m.first(x)) * m.scale + m.shift),
            first=conv(3, 8), scale=nn.Parameter(torch.rand(8, 1, 1)), shift=nn.Parameter(torch.rand(1, 8, 1, 1)),
            out=head(8),
        ),
        8,
    ),
    "a parameter as kernel": (
        lambda: Run(
            lambda m, x: m.out(F.relu(F.conv2d(x, m.kernel))), kernel=nn.Parameter(torch.rand(8, 3, 3, 3)), out=head(8)
        ),
        8,
    ),
    "split and used several times": (
        lambda: Run(
            lambda m, x: m.out(torch.cat([*(y := m.first(x).chunk(2, 1)), z := m.body(y[1]), m.body2(z) + z], 1)),
            **{"first": conv(3, 12), "body": conv(6, 6), "body2": conv(6, 6), "out": head(24)},
        ),
        6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNED)
def test_layers_are_pruned(name: str) -> None:
    build, units = PRUNED[name]
    graph = prove(build())
    assert len(graph.groups[0].free) == units, graph.groups[0].reason


@pytest.mark.parametrize("dim", [1, 3])
def test_one_and_three_dimensional_networks(dim: int) -> None:
    kinds = {1: (nn.Conv1d, nn.BatchNorm1d, nn.ConvTranspose1d), 3: (nn.Conv3d, nn.BatchNorm3d, nn.ConvTranspose3d)}
    conv_, norm, back = kinds[dim]
    pool = nn.AdaptiveAvgPool1d(1) if dim == 1 else nn.AdaptiveAvgPool3d(1)
    layers = [conv_(2, 8, 3, padding=1), norm(8), nn.ReLU(), conv_(8, 8, 3, padding=1, groups=8), nn.ReLU()]
    tail = [back(8, 6, 2, stride=2), norm(6), nn.ReLU(), pool, nn.Flatten(), nn.Linear(6, 3)]
    graph = prove(nn.Sequential(*layers, *tail), torch.zeros(2, 2, *(6,) * dim, dtype=torch.float64))
    assert [len(group.free) for group in graph.groups[:2]] == [8, 6]


FROZEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LSTM": (
        lambda: Run(
            lambda m, x: m.out(m.lstm(m.first(x).flatten(2).transpose(1, 2))[0][:, -1]),
            **{"first": conv(3, 8), "lstm": nn.LSTM(8, 6, batch_first=True), "out": nn.Linear(6, 3)},
        ),
        "lstm",
    ),
    "a new weight normalisation": (
        lambda: nn.Sequential(
            conv(3, 8), nn.ReLU(), nn.utils.parametrizations.weight_norm(conv(8, 8)), nn.ReLU(), head(8)
        ),
        "convolution",
    ),
    "a number of channels in the code": (
        lambda: Run(lambda m, x: m.out(m.first(x).mean((2, 3)).view(-1, 8)), first=conv(3, 8), out=nn.Linear(8, 3)),
        "sizes written into the code",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_pruned_is_left_with_a_reason(name: str) -> None:
    build, reason = FROZEN[name]
    graph = prove(build())
    assert reason in str(graph.groups[0].reason)


def test_embeddings_are_pruned() -> None:
    model = Run(
        lambda m, x: m.out(F.gelu(m.hidden(m.table(x)).mean(1))),
        **{"table": nn.Embedding(10, 8), "hidden": nn.Linear(8, 6), "out": nn.Linear(6, 3)},
    )
    graph = prove(model, torch.zeros(2, 5, dtype=torch.int64))
    assert [len(group.free) for group in graph.groups] == [8, 6, 0]


def test_tied_weights_stay_tied() -> None:
    model = Run(
        lambda m, x: m.out(torch.relu(m.b(torch.relu(m.a(m.first(x)))))),
        **{"first": conv(3, 8), "a": conv(8, 8), "b": conv(8, 8), "out": head(8)},
    )
    model.b.weight = model.a.weight
    prove(model)
    graph = surgery.trace(model, X)
    plan = Plan([Keep("first", range(5))])
    small = surgery.edit(model, plan, graph)
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape[:2] == (5, 5)


def test_one_module_under_two_names() -> None:
    shared = conv(8, 8)
    graph = prove(nn.Sequential(conv(3, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), head(8)))
    assert len(graph.groups[0].free) == 8


def test_everything_else_of_a_model_survives() -> None:
    calls: list[str] = []
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), nn.ReLU(), head(6))
    model = lively(model)
    model.train()
    model[4].eval()
    model[0].weight.requires_grad_(False)
    model[3].to(memory_format=torch.channels_last)
    model.register_buffer("note", torch.arange(3))
    model[2].register_forward_hook(lambda *_: calls.append("hook"))
    model.extra = {"name": "kept"}
    graph = surgery.trace(model, X)
    before = len(calls)
    small = surgery.edit(model, Plan([Keep("0", range(4)), Keep("3", range(5))]), graph)
    assert [m.training for m in small] == [m.training for m in model]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    assert small[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(small.note, torch.arange(3))
    assert small.extra == {"name": "kept"}
    assert small.extra is not model.extra
    small(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert len(calls) == before + 1
    assert small[0].weight.data_ptr() != model[0].weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_pruned_and_proven(dtype: torch.dtype) -> None:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), head(8)).to(dtype).eval()
    graph = surgery.trace(model, X.to(dtype))
    plan = Plan([Keep("0", range(4))])
    small = surgery.edit(model, plan, graph)
    assert {p.dtype for p in small.parameters()} == {dtype}
    surgery.verify(model, small, plan, graph)
