"""Heads of attention, in whatever way it is written: cut whole, and proven against the original with heads silenced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit as pk
from networks import lively
from prunekit import surgery
from prunekit.nn.attention import HeadAttention, free_all
from prunekit.surgery.structure import conform, describe

Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
X = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


def fused(_m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * m.head_dim**-0.5).softmax(-1) @ v


def in_einsums(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * m.head_dim**-0.5
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def biased(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(4)[:, None] - torch.arange(4)[None] + 3
    bias = m.table[index.reshape(-1)].view(4, 4, -1).permute(2, 0, 1)
    return (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v


def masked(_m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, torch.ones(4, 4, dtype=torch.bool).tril())


def turned(x: Tensor) -> Tensor:
    """Rotary positions, by halves."""
    angles = torch.arange(4, dtype=x.dtype)[:, None] * torch.arange(x.shape[-1], dtype=x.dtype)
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * angles.cos() + torch.cat((-b, a), -1) * angles.sin()


def woven(x: Tensor) -> Tensor:
    """Rotary positions, pair by pair."""
    angles = torch.arange(4, dtype=x.dtype)[:, None] * torch.arange(x.shape[-1], dtype=x.dtype)
    return x * angles.cos() + torch.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape) * angles.sin()


def rotary(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(m, turned(q), turned(k), v)


def interleaved(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(m, woven(q), woven(k), v)


def normed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(m, m.norm(q), m.norm(k), v)


def by_angle(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (scores * m.scale.exp()).softmax(-1) @ v


def linear(_m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1))


def across_channels(_m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (F.normalize(q, dim=-2).transpose(-2, -1) @ F.normalize(k, dim=-2)).softmax(-1)
    return (weights @ v.transpose(-2, -1)).transpose(-2, -1)


ATTENTION: dict[str, Attend] = {
    one.__name__: one
    for one in (
        *(fused, by_hand, in_einsums, biased, masked, rotary, interleaved),
        *(normed, by_angle, linear, across_channels),
    )
}


def packed_by_parts(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    qkv = m.qkv(x).reshape(*x.shape[:2], 3, m.num_heads, m.head_dim)
    return tuple(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def packed_by_heads(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(m.qkv(x).view(*x.shape[:2], m.num_heads, -1).transpose(1, 2).chunk(3, -1))


def packed_and_cut(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for part in m.qkv(x).chunk(3, -1))


def apart(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    made = [layer(x).view(*x.shape[:2], -1, m.head_dim).transpose(1, 2) for layer in (m.q, m.k, m.v)]
    shared = m.heads // (m.num_heads if m.kv_heads is None else m.kv_heads)
    return (made[0], *(one.repeat_interleave(shared, 1) if shared > 1 else one for one in made[1:]))


PROJECTIONS = {one.__name__: one for one in (packed_by_parts, packed_by_heads, packed_and_cut, apart)}


class Attention(nn.Module):
    """Attention of `heads` heads that are `width` wide; with `kv_heads`, several heads share keys and values."""

    def __init__(
        self, embedding: int, heads: int, width: int, attend: Attend, project: Any, kv_heads: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.all_dim = heads, width, heads * width
        self.kv_heads, self._attend, self._project = kv_heads, attend, project
        self._shared = heads // (kv_heads or heads)
        if project is apart:
            self.q = nn.Linear(embedding, heads * width)
            self.k, self.v = (nn.Linear(embedding, (kv_heads or heads) * width) for _ in range(2))
        else:
            self.qkv = nn.Linear(embedding, 3 * heads * width)
        if attend is normed:
            self.norm = nn.LayerNorm(width)
        if attend is biased:
            self.table = nn.Parameter(torch.randn(7, heads))
        if attend is by_angle:
            self.scale = nn.Parameter(torch.randn(heads, 1, 1))
        self.proj = nn.Linear(heads * width, embedding)

    @property
    def heads(self) -> int:
        return self._shared * (self.kv_heads or self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        out = self._attend(self, *self._project(self, x))
        return self.proj(out.transpose(1, 2).reshape(*x.shape[:2], self.all_dim))


class Transformer(nn.Module):
    """Patches, blocks of attention and an MLP, a head."""

    def __init__(self, *attention: nn.Module, embedding: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, embedding, 4, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(embedding), "attention": one, "mlp": mlp(embedding)})
            for one in attention
        )
        self.head = nn.Linear(embedding, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            y, attention = block["norm"](x), block["attention"]
            x = x + (attention(y, y, y)[0] if isinstance(attention, nn.MultiheadAttention) else attention(y))
            x = x + block["mlp"](x)
        return self.head(x.mean(1))


def mlp(embedding: int) -> nn.Module:
    return nn.Sequential(nn.Linear(embedding, 2 * embedding), nn.GELU(), nn.Linear(2 * embedding, embedding))


def silenced(model: nn.Module, out: str, width: int, kept: list[int]) -> nn.Module:
    """A copy of the whole network in which nothing is read of other heads than `kept`."""
    silent = copy.deepcopy(model)
    weight = silent.get_submodule(out).weight
    with torch.no_grad():
        for head in range(weight.size(1) // width):
            if head not in kept:
                weight[:, head * width : (head + 1) * width] = 0
    return silent


def check_heads(model: nn.Module, group: str, kept: list[int], out: str, width: int, each: int = 1) -> nn.Module:
    """Cut all but `kept` units of a group, of `each` heads; the rest must compute what the silenced whole does."""
    small = pk.apply(model, pk.Plan([pk.Keep(group, kept)]), X)
    heads = [unit * each + i for unit in kept for i in range(each)]
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(small(x), silenced(model, out, width, heads)(x), rtol=1e-9, atol=1e-10)
    assert small.get_submodule(out).weight.size(1) == width * len(heads)
    return small


@pytest.mark.parametrize("project", PROJECTIONS.values(), ids=PROJECTIONS)
@pytest.mark.parametrize("attend", ATTENTION.values(), ids=ATTENTION)
def test_heads_go_whole(attend: Attend, project: Any) -> None:
    model = lively(Transformer(Attention(12, 3, 4, attend, project)))
    name = "blocks.0.attention." + ("q" if project is apart else "qkv")
    group = surgery.trace(model, X).group(name)
    assert (group.size, len(group.free)) == (3, 3)
    small = check_heads(model, name, [0, 2], "blocks.0.attention.proj", 4)
    assert small.get_submodule("blocks.0.attention").all_dim == 8


@given(
    heads=st.integers(2, 4),
    width=st.sampled_from([2, 4]),
    attend=st.sampled_from(sorted(ATTENTION)),
    project=st.sampled_from(sorted(PROJECTIONS)),
    shared=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=12, deadline=None)
def test_generated_attention(heads: int, width: int, attend: str, project: str, shared: int, data: Any) -> None:
    if attend == "in_einsums":  # which take another way for a single head
        heads = max(heads, 3)
    shared = shared if project == "apart" else 1
    attention = Attention(10, heads * shared, width, ATTENTION[attend], PROJECTIONS[project], heads)
    model = lively(Transformer(attention, mixed := Attention(10, 2, 4, fused, apart), embedding=10))
    kept = sorted(data.draw(st.sets(st.integers(0, heads - 1), min_size=1, max_size=heads - 1)))
    name = "blocks.0.attention." + ("q" if project == "apart" else "qkv")
    check_heads(model, name, kept, "blocks.0.attention.proj", width, shared)
    assert mixed.num_heads == 2


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_multihead_attention(batch_first: bool, bias: bool) -> None:
    attention = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first)
    model = lively(Transformer(attention))
    small = check_heads(model, "blocks.0.attention", [1], "blocks.0.attention.out_proj", 4)
    cut = small.get_submodule("blocks.0.attention")
    assert isinstance(cut, HeadAttention)
    assert cut.num_heads == 1
    assert type(attention) is nn.MultiheadAttention  # the caller's network keeps its own


class Masked(nn.Module):
    """Attention from one tensor to another, with every kind of mask."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q: Tensor, kv: Tensor, mask: Tensor, padding: Tensor, average: bool) -> Any:
        kinds = {"attn_mask": mask, "key_padding_mask": padding, "average_attn_weights": average}
        return self.attention(q, kv, kv, **kinds), self.attention(q, kv, kv, need_weights=False, attn_mask=mask)


@pytest.mark.parametrize("shape", [(2, 5), (5,)], ids=["batch", "no batch"])
@pytest.mark.parametrize("apart_weights", [False, True])
def test_the_stand_in_computes_what_multihead_attention_does(shape: tuple[int, ...], apart_weights: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=6 if apart_weights else None, vdim=6 if apart_weights else None)
    attention.batch_first = True
    model = lively(Masked(attention)).eval()
    freed = copy.deepcopy(model)
    free_all(freed)
    assert isinstance(freed.attention, HeadAttention)
    q = torch.randn(*shape, 8, dtype=torch.float64)
    kv = torch.randn(*shape[:-1], 4, 6 if apart_weights else 8, dtype=torch.float64)
    hidden = torch.arange(4).expand(*shape[:-1], 4) == 3
    heads = 2 * (shape[0] if len(shape) > 1 else 1)
    for mask in (torch.ones(5, 4, dtype=torch.bool).triu(1), torch.randn(heads, 5, 4, dtype=torch.float64)):
        padding = hidden if mask.dtype == torch.bool else torch.zeros(hidden.shape).double().masked_fill(hidden, -9.0)
        for average in (True, False):
            (want, weights), (fast, _) = model(q, kv, mask, padding, average)
            (have, own), (also, _) = freed(q, kv, mask, padding, average)
            torch.testing.assert_close((have, own, also), (want, weights, fast))


def test_an_encoder_layer_of_pytorch_takes_no_fused_path_past_its_heads() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 12, 4, 4)
            layer = nn.TransformerEncoderLayer(12, 4, 24, batch_first=True, norm_first=True)
            self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    model = lively(Encoder()).eval()
    with torch.no_grad():
        check_heads(model, "layers.layers.0.self_attn", [0, 3], "layers.layers.0.self_attn.out_proj", 3)


def test_what_is_noted_of_pruned_heads_rebuilds_them() -> None:
    model = lively(
        Transformer(nn.MultiheadAttention(12, 3, batch_first=True), Attention(12, 3, 4, fused, packed_by_parts))
    )
    plan = pk.Plan([pk.Keep("blocks.0.attention", [0, 2]), pk.Keep("blocks.1.attention.qkv", [1])])
    small = pk.apply(model, plan, X)
    again = conform(copy.deepcopy(model), describe(small))
    again.load_state_dict(small.state_dict())
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)


HELD: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "an embedding that a reshape ties to a number": (
        lambda m, x: m.proj(fused(m, *packed_by_parts(m, x)).transpose(1, 2).reshape(*x.shape[:2], 12)),
        "has sizes written into the code",
    ),
    "heads written into the code": (
        lambda m, x: m.proj(
            fused(m, *m.qkv(x).reshape(*x.shape[:2], 3, 3, -1).permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        ),
        "has sizes written into the code",
    ),
    "a mask with a part for each head": (
        lambda m, x: m.proj(
            ((fixed := packed_by_parts(m, x))[0] @ fixed[1].transpose(-2, -1) + torch.ones(1, 3, 4, 4).to(x))
            .matmul(fixed[2])
            .transpose(1, 2)
            .flatten(2)
        ),
        "values that have fixed channels",
    ),
}


@pytest.mark.parametrize(("body", "reason"), HELD.values(), ids=HELD)
def test_heads_that_code_counts_stay(body: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    class Written(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return body(self, x)

    model = lively(Transformer(Written(12, 3, 4, fused, packed_by_parts)))
    graph = surgery.trace(model, X)
    assert reason in str(graph.group("blocks.0.attention.qkv").reason)
    with pytest.raises(pk.errors.SurgeryError, match="cannot be removed"):
        pk.apply(model, pk.Plan([pk.Keep("blocks.0.attention.qkv", [0])]), X)
    assert graph.group("blocks.0.mlp.0").free


def test_weights_of_attention_that_are_returned_hold_the_heads() -> None:
    class Telling(Transformer):
        def forward(self, x: Tensor) -> Any:
            y = self.patches(x).flatten(2).transpose(1, 2)
            out, weights = self.blocks[0]["attention"](y, y, y)
            return self.head(out.mean(1)), weights

    model = lively(Telling(nn.MultiheadAttention(12, 3, batch_first=True)))
    assert "across channels" in str(surgery.trace(model, X).group("blocks.0.attention").reason)


def test_a_network_cut_at_the_wrong_heads_is_refused() -> None:
    model = lively(Transformer(Attention(12, 3, 4, fused, packed_by_parts)))
    graph = surgery.trace(model, X)
    plan, other = (pk.Plan([pk.Keep("blocks.0.attention.qkv", kept)]) for kept in ([0, 2], [0, 1]))
    with pytest.raises(pk.errors.SurgeryError, match="differ"):
        surgery.verify(model, surgery.edit(model, other, graph), plan, graph)


def swin(version: str) -> nn.Module:
    from torchvision.models import swin_transformer as tv

    block = tv.SwinTransformerBlock if version == "1" else tv.SwinTransformerBlockV2
    downsample = tv.PatchMerging if version == "1" else tv.PatchMergingV2
    return tv.SwinTransformer(
        [2, 2], 8, [2, 1], [2, 4], [4, 4], 2.0, num_classes=5, block=block, downsample_layer=downsample
    )


def maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, 0.0, num_classes=5)


TORCHVISION = {"swin": lambda: swin("1"), "swin v2": lambda: swin("2"), "maxvit": maxvit}


@pytest.mark.parametrize("make", TORCHVISION.values(), ids=TORCHVISION)
def test_attention_of_torchvision(make: Callable[[], nn.Module]) -> None:
    model = lively(make())
    side = 32 if make is maxvit else 26  # which windows do not divide
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    freed = copy.deepcopy(model)
    free_all(freed)
    torch.testing.assert_close(freed(x), model(x))
    graph = surgery.trace(model, x)
    heads = [group for group in graph.groups if any("qkv" in m.parameter for m in group.producers)]
    assert heads
    assert all(len(group.free) == group.size > 1 for group in heads)
    small = pk.apply(model, pk.Plan([pk.Keep(group.name, [1]) for group in heads]), x)
    again = conform(copy.deepcopy(model), describe(small))
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)
