"""Layers that are not what their class says: several weights, weights that functions use, forwards of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit as pk


class Stemmed(nn.Module):
    """Two convolutions with batch norms, `(N, 8, 6, 6)`, then something, then a convolution."""

    def __init__(self, between: nn.Module, made: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        )
        with torch.no_grad():
            for norm in (self.stem[1], self.stem[4]):
                norm.weight.uniform_(0.1, 1.0)
                norm.bias.normal_()
        self.between = between
        self.out = nn.Conv2d(made, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.between(self.stem(x)))


class LowRank(nn.Linear):
    """A linear layer with a correction of low rank beside it, over the channels."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down, self.up = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8, 4))

    def forward(self, input: Tensor) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        return (super().forward(x) + F.linear(F.linear(x, self.down), self.up)).permute(0, 3, 1, 2)


class Listed(nn.Module):
    """Kernels in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList([nn.Parameter(torch.randn(8, 8, 1, 1)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for kernel in self.kernels:
            x = F.relu(F.conv2d(x, kernel))
        return x


class Cell(nn.Module):
    """A hand-written gated cell over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 8))
        self.v, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = torch.tanh(F.linear(x, self.w, self.b)) * torch.sigmoid(F.linear(x, self.u))
        return F.linear(x, self.v).permute(0, 3, 1, 2)


class Tied(nn.Module):
    """An encoder, and its transpose as the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.encoder(x.permute(0, 2, 3, 1)))
        return F.linear(code, self.encoder.weight.t()).permute(0, 3, 1, 2)


class SamePadding(nn.Conv2d):
    """Pads by itself, as ports from other frameworks do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 2, 0, 2)))


class Bypassed(nn.Module):
    """Layers that only lend their weights, and one that is called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.a.weight, self.a.bias))
        return F.relu(self.c(input=F.relu(self.b.forward(x))))


class OwnNorm(nn.Module):
    """Batch norm by its function, on parameters of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.scale, self.shift = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.running_mean, self.running_var, self.scale, self.shift)
        return F.relu(x)


class Heads(nn.Module):
    """Attention among the places."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.inner(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "low rank": LowRank,
    "list": Listed,
    "cell": Cell,
    "tied": Tied,
    "same padding": lambda: SamePadding(8, 8, 3),
    "bypassed": Bypassed,
    "norm by function": OwnNorm,
    "attention": Heads,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, bias=False),
}
WAYS: dict[str, dict[str, Any]] = {
    "slim": {},
    "slim calibrate": {"images": True},
    "slim synthetic": {"restore": "synthetic"},
    "merge": {},
    "merge all": {"scope": "all"},
    "merge none": {"restore": "none"},
    "merge moments": {"restore": "moments"},
    "merge calibrate": {"images": True},
    "merge synthetic": {"restore": "synthetic"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_prunes_what_it_can(kind: str, way: str) -> None:
    """The stem's first convolution can always go; the proof is in `prune`."""
    model, settings = Stemmed(KINDS[kind]()).eval(), dict(WAYS[way])
    if settings.pop("images", False):
        settings["images"] = torch.randn(16, 3, 6, 6)
    result = pk.prune(way.split()[0], model, torch.randn(1, 3, 6, 6), ratio=0.3, **settings)
    assert result.after.params == sum(p.numel() for p in result.model.parameters()) < result.before.params
    assert result.model.stem[0].out_channels < 8 or result.model.stem[3].out_channels < 8
