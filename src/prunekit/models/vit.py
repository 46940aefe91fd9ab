"""Vision transformers for small images (Dosovitskiy et al., ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.models.common import scaled


class SelfAttention(nn.Module):
    """Attention between all positions, `(N, positions, embedding)` to the same shape, with heads of a given width.

    Queries and keys may come to be narrower than values, and the other way round.
    """

    def __init__(self, embedding: int, heads: int, width: int) -> None:
        super().__init__()
        self.query_width = self.value_width = width
        self.qkv = nn.Linear(embedding, 3 * heads * width)
        self.proj = nn.Linear(heads * width, embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, with as many heads as the weights have."""
        queries, values = self.query_width, self.value_width
        heads = self.proj.in_features // values
        parts = self.qkv(x).split([heads * queries, heads * queries, heads * values], -1)
        widths = queries, queries, values
        q, k, v = (
            part.unflatten(-1, (heads, width)).transpose(1, 2) for part, width in zip(parts, widths, strict=True)
        )
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm and added to the stream."""

    def __init__(self, embedding: int, heads: int, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(embedding), nn.LayerNorm(embedding)
        self.attention = SelfAttention(embedding, heads, width)
        self.mlp = nn.Sequential(nn.Linear(embedding, hidden), nn.GELU(), nn.Linear(hidden, embedding))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream with what both add."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class SmallViT(nn.Module):
    """Vision transformer for square images of `size` pixels: `(N, C, size, size)` to `(N, num_classes)`.

    Positions are learned, and averaged at the end. `width` scales the embedding, the heads' and the MLPs' widths; the
    number of heads stays.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        size: int = 32,
        patch: int = 4,
        embedding: int = 192,
        depth: int = 6,
        heads: int = 6,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        of_head = scaled(embedding // heads, width)
        inner = of_head * heads
        self.patches = nn.Conv2d(in_channels, inner, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, inner) * 0.02)
        self.blocks = nn.Sequential(*(Block(inner, heads, of_head, 2 * inner) for _ in range(depth)))
        self.norm = nn.LayerNorm(inner)
        self.head = nn.Linear(inner, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores, `(N, num_classes)`."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        scores: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return scores
