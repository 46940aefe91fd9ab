"""Which heads of attention stay, and how what reads them makes up for the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
from prunekit import surgery
from prunekit.methods.merge.selection import losses, pivoted
from prunekit.models.vit import SmallViT
from prunekit.restoration.second_moments import Reading

HEADS, WIDTH = 4, 3


class Separate(nn.Module):
    """Attention with a layer each for queries, keys and values, in a residual stream."""

    def __init__(self, embedding: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(embedding, HEADS * WIDTH) for _ in range(3))
        self.proj = nn.Linear(HEADS * WIDTH, embedding)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], -1, WIDTH).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        return out


class Packed(nn.Module):
    """The same with PyTorch's own attention."""

    def __init__(self, embedding: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(embedding, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(x, x, x)[0]
        return out


class Small(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.patches, self.body, self.head = nn.Conv2d(1, 12, 2, 2), make(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return scores


def network(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return Small(make).double().eval()


def reading(seed: int = 0) -> Reading:
    draw = torch.Generator().manual_seed(seed)
    rows, out = (torch.randn(40, HEADS * WIDTH, generator=draw, dtype=torch.float64) for _ in range(2))
    return Reading(rows.t() @ rows / 40, out.t() @ out, width=WIDTH)


def left_by(one: Reading, kept: list[int]) -> float:
    """What least squares from the channels of the kept heads leaves of what is read."""
    here = [unit * WIDTH + i for unit in kept for i in range(WIDTH)]
    s = one.covariance
    own = s[here][:, here] + 1e-3 * s.diagonal().mean() * torch.eye(len(here)).double()
    return float(((s - s[:, here] @ torch.linalg.solve(own, s[here])) * one.gram).sum())


@pytest.mark.parametrize("seed", range(3))
def test_heads_are_judged_by_what_least_squares_leaves(seed: int) -> None:
    one = reading(seed)
    order, curve = pivoted(one)
    assert sorted(order) == list(range(HEADS))
    best = min(range(HEADS), key=lambda unit: left_by(one, [unit]))
    assert order[0] == best
    assert curve[1] == pytest.approx(left_by(one, [best]), rel=1e-6)
    np.testing.assert_allclose(losses(one, order), curve)


def test_a_head_that_repeats_another_goes_first() -> None:
    one = reading()
    again = torch.eye(HEADS * WIDTH, dtype=torch.float64)
    again[-WIDTH:] = 0
    again[-WIDTH:, :WIDTH] = torch.randn(WIDTH, WIDTH, dtype=torch.float64)  # in a basis of its own
    mixed = Reading(again @ one.covariance @ again.t(), one.gram, width=WIDTH)
    assert pivoted(mixed)[0][-1] in (0, HEADS - 1)


def test_without_images_the_head_that_writes_least_goes() -> None:
    model = network(Separate)
    with torch.no_grad():
        model.get_submodule("body.proj").weight[:, 2 * WIDTH : 3 * WIDTH] *= 1e-3
    small = pk.prune("merge", model, torch.zeros(1, 1, 8, 8).double(), ratio={"body.q": 0.25}, restore="none")
    assert [keep.index for keep in small.plan.keeps] == [(0, 1, 3)]


@pytest.mark.parametrize("make", [Separate, Packed])
def test_the_output_projection_makes_up_for_heads(make: Any) -> None:
    """On images that were not used, and without a change to the network that was given."""
    model, draw = network(make), torch.Generator().manual_seed(1)
    images = torch.randn(300, 1, 8, 8, generator=draw, dtype=torch.float64)
    used, held_out = images[:200], images[200:]
    errors = {}
    for way in ("none", "calibrate"):
        settings: dict[str, Any] = {"images": used} if way == "calibrate" else {}
        small = pk.prune("merge", model, used[:1], ratio=0.5, restore=way, **settings)
        assert small.difference is not None
        assert small.difference < 1e-9
        with torch.no_grad():
            errors[way] = float((small.model(held_out) - model(held_out)).square().mean())
    assert errors["calibrate"] < 0.5 * errors["none"]


def test_heads_and_mlps_of_the_bundled_vision_transformer() -> None:
    model = SmallViT(size=8, patch=4, embedding=12, depth=2, heads=3, in_channels=1).eval()
    small = pk.prune("merge", model, torch.zeros(1, 1, 8, 8), ratio=0.34, restore="none")
    assert {keep.group for keep in small.plan.keeps} >= {"blocks.0.attention.qkv", "blocks.1.mlp.0"}
    assert small.after.macs < small.before.macs


@pytest.mark.parametrize("make", [Separate, Packed])
def test_the_cost_of_products_falls_with_the_heads(make: Any) -> None:
    model, x = network(make), torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    graph = surgery.trace(model, x)
    (name,) = graph.heads
    small = pk.apply(model, pk.Plan([pk.Keep(name, [0, 2, 3])]), x)
    left = surgery.predict(graph, graph.kept_classes({name: (0, 2, 3)}))
    assert left.macs == surgery.measure(small, x).macs < surgery.measure(model, x).macs
