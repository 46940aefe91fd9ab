"""Heads of attention become narrower: proven against the original with coordinates silenced, and in the best bases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunekit as pk
from networks import lively
from prunekit import surgery
from prunekit.methods.narrow_heads.low_rank import joint_basis
from prunekit.models.vit import SmallViT
from prunekit.surgery.structure import conform, describe
from test_attention import ATTENTION, PROJECTIONS, Attention, Transformer, X, apart, by_hand, fused, maxvit, swin

HEADS, WIDTH = 3, 4
NARROW = ("fused", "by_hand", "in_einsums", "biased", "masked")
RIGID = {
    "rotary": "its coordinates are read together",
    "interleaved": "its coordinates are read together",
    "normed": "its coordinates are read together",
    "by_angle": "its coordinates are read together",
    "linear": "its coordinates are read together",
    "across_channels": "its coordinates are read together",
}


def silenced(model: nn.Module, kept: list[int], layers: tuple[str, str], *, queries: bool, values: bool) -> nn.Module:
    """A copy of the network in which only `kept` coordinates of queries are made, or of values are read."""
    silent = copy.deepcopy(model)
    made, out = (silent.get_submodule(f"blocks.0.attention.{layer}") for layer in layers)
    gone = [h * WIDTH + i for h in range(HEADS) for i in range(WIDTH) if i not in kept]
    with torch.no_grad():
        if queries:  # they come first in packed projections
            made.weight[gone] = 0
            made.bias[gone] = 0
        if values:
            out.weight[:, gone] = 0
    return silent


def widths(model: nn.Module, x: Any = X) -> dict[str, Any]:
    graph = surgery.trace(model, x, inside_heads=True)
    return {width.name: width for width in graph.inside.widths} if graph.inside else {}


@given(
    attend=st.sampled_from(NARROW),
    project=st.sampled_from(["packed_by_parts", "packed_and_cut", "apart"]),
    kept=st.sets(st.integers(0, WIDTH - 1), min_size=1, max_size=WIDTH - 1),
)
@settings(max_examples=12, deadline=None)
def test_queries_keys_and_values_become_narrower_alike(attend: str, project: str, kept: set[int]) -> None:
    layer = "q" if project == "apart" else "qkv"
    model = lively(Transformer(Attention(12, HEADS, WIDTH, ATTENTION[attend], PROJECTIONS[project])))
    name = f"blocks.0.attention.{layer}[qkv]"
    small = pk.apply(model, pk.Plan([pk.Keep(name, kept)]), X)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    want = silenced(model, sorted(kept), (layer, "proj"), queries=True, values=True)
    torch.testing.assert_close(small(x), want(x), rtol=1e-9, atol=1e-10)
    attention = small.get_submodule("blocks.0.attention")
    assert (attention.head_dim, attention.all_dim) == (len(kept), HEADS * len(kept))


def test_a_network_may_have_other_widths_for_values_than_for_queries() -> None:
    model = lively(SmallViT(size=8, patch=4, embedding=12, depth=1, heads=3, in_channels=3))
    names = list(widths(model))
    assert names == ["blocks.0.attention.qkv[qk]", "blocks.0.attention.qkv[v]"]
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for name, queries in zip(names, (True, False), strict=True):
        small = pk.apply(model, pk.Plan([pk.Keep(name, [0, 3])]), X)
        want = silenced(model, [0, 3], ("qkv", "proj"), queries=queries, values=not queries)
        torch.testing.assert_close(small(x), want(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("attend", RIGID)
def test_what_reads_coordinates_together_holds_their_number(attend: str) -> None:
    model = lively(Transformer(Attention(12, HEADS, WIDTH, ATTENTION[attend], apart)))
    graph = surgery.trace(model, X, inside_heads=True)
    assert RIGID[attend] in graph.rigid["blocks.0.attention.q"]
    assert graph.group("blocks.0.attention.q").free
    with pytest.raises(pk.errors.InputError, match="can become narrower"):
        pk.prune("narrow-heads", model, X, ratio=0.5, parts="qk")


class TwoWays(Attention):
    """Attention that is fused or not, and has the factor of the scores in an attribute for the second way alone."""

    def __init__(self) -> None:
        super().__init__(12, HEADS, WIDTH, fused, PROJECTIONS["packed_by_parts"])
        self.scale, self.fused = WIDTH**-0.5, True

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(self, x)
        out = fused(self, q, k, v) if self.fused else ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


def test_ways_through_the_code_that_did_not_run_have_the_same_factor() -> None:
    model = lively(Transformer(TwoWays()))
    small = pk.apply(model, pk.Plan([pk.Keep("blocks.0.attention.qkv[qkv]", [0, 1])]), X)
    again = conform(copy.deepcopy(model), describe(small))
    again.load_state_dict(small.state_dict())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    want = small(x)
    for other in (small, again):
        other.get_submodule("blocks.0.attention").fused = False
        torch.testing.assert_close(other(x), want, rtol=1e-9, atol=1e-10)


def test_a_width_written_into_the_code_holds_it() -> None:
    class Written(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(fused(self, q, k, v).transpose(1, 2).flatten(2))

    graph = surgery.trace(lively(Transformer(Written(12, 3, 4, fused, None))), X, inside_heads=True)
    assert "has sizes written into the code" in graph.rigid["blocks.0.attention.qkv"]
    assert len(graph.group("blocks.0.attention.qkv").free) == 3


def test_heads_and_widths_go_at_once_at_the_predicted_cost() -> None:
    model = lively(Transformer(Attention(12, 3, 4, by_hand, apart), nn.MultiheadAttention(12, 3, batch_first=True)))
    graph = surgery.trace(model, X, inside_heads=True)
    plan = pk.Plan(
        [
            *(pk.Keep(name, [1, 2]) for name in ("blocks.0.attention.q", "blocks.0.attention.q[qkv]")),
            *(pk.Keep(name, [0]) for name in ("blocks.1.attention", "blocks.1.attention[qkv]")),
        ]
    )
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) < 1e-10
    left = surgery.predict(graph, surgery.resolve(graph, plan).kept)
    assert (left.params, left.macs) == (surgery.measure(small, X).params, surgery.measure(small, X).macs)
    with torch.no_grad():  # as if nothing had made up for the factor of the scores
        small.get_submodule("blocks.0.attention.q").weight.mul_(2**0.5)
    with pytest.raises(pk.errors.SurgeryError, match="differ"):
        surgery.verify(model, small, plan, graph)


@pytest.mark.parametrize("make", [lambda: swin("1"), maxvit], ids=["swin", "maxvit"])
def test_attention_of_torchvision(make: Any) -> None:
    model, x = lively(make()), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    found = widths(model, x)
    assert found
    small = pk.apply(model, pk.Plan([pk.Keep(name, [0, 2]) for name in found]), x)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def planted(model: Attention, rank: int) -> None:
    """Let keys and values of each head have a low rank, in a basis that nothing shows; their biases have not."""
    with torch.no_grad():
        for layer in (model.k, model.v):
            for rows in range(0, layer.out_features, WIDTH):
                low = torch.randn(WIDTH, rank, dtype=torch.float64)
                own = layer.weight[rows : rows + WIDTH]
                layer.weight[rows : rows + WIDTH] = low @ torch.linalg.pinv(low) @ own


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_has_a_low_rank_is_kept_whole(kv_heads: int) -> None:
    """With biases, behind a layer norm; and where several heads share keys and values."""
    torch.manual_seed(0)
    attention = Attention(12, 4, WIDTH, fused, apart, kv_heads)
    model = lively(Transformer(attention))
    planted(attention, 2)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    small = pk.prune("narrow-heads", model, X, ratio={"blocks.0.attention.q[qkv]": 0.5})
    torch.testing.assert_close(small.model(x), model(x), rtol=1e-8, atol=1e-8)
    plain = pk.apply(model, pk.Plan([pk.Keep("blocks.0.attention.q[qkv]", [0, 1])]), X)
    assert float((plain(x) - model(x)).detach().abs().max()) > 1e-3


@given(heads=st.integers(1, 3), width=st.integers(2, 5), rank=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_products_are_approximated_as_well_as_can_be(heads: int, width: int, rank: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(heads, width, 7, generator=draw, dtype=torch.float64)
    right = torch.randn(width, 6, generator=draw, dtype=torch.float64)
    rank = min(rank, width)
    turns, turn, values = joint_basis(left @ left.transpose(1, 2), right @ right.t())
    whole = (left.transpose(1, 2) @ right).flatten(0, 1)
    near = ((turns @ left)[:, :rank].transpose(1, 2) @ (turn @ right)[:rank]).flatten(0, 1)
    torch.testing.assert_close(values, torch.linalg.svdvals(whole)[:width], rtol=1e-6, atol=1e-8)
    best = float(torch.linalg.svdvals(whole)[rank:].square().sum())
    assert float((whole - near).square().sum()) == pytest.approx(best, rel=1e-6, abs=1e-8)


def test_narrower_heads_are_written_and_read(tmp_path: Path) -> None:
    model = pk.load("prunekit:vit_digits")
    small = pk.prune("narrow-heads", model, target_params="80%").model
    pk.save(small, tmp_path / "narrow.pt")
    again, x = pk.load(tmp_path / "narrow.pt"), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again(x), small.eval()(x), rtol=0, atol=0)


def test_networks_without_such_heads_are_told_so() -> None:
    with pytest.raises(pk.errors.InputError, match="no heads of attention"):
        pk.prune("narrow-heads", pk.load("prunekit:resnet20"), ratio=0.5)
    model = lively(Transformer(Attention(12, 3, 4, fused, apart)))
    with pytest.raises(pk.errors.InputError, match="no width of their own"):
        pk.prune("narrow-heads", model, X, ratio=0.5, parts="v")
