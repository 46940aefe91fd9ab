"""Attention of torchvision's Swin Transformers and MaxViT with any number of heads; see `attention.py`.

Swin Transformer (Liu et al., ICCV 2021), its second version (Liu et al., CVPR 2022), MaxViT (Tu et al., ECCV 2022).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


class WindowAttention(ShiftedWindowAttention):  # type: ignore[misc]  # torchvision has no types
    """Attention within windows that are shifted against a grid: `(N, H, W, C)` to the same shape."""

    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window."""
        batch, height, width, _ = x.shape
        down, right = self.window_size
        x = F.pad(x, (0, 0, 0, -width % right, 0, -height % down))
        shift = [
            s if size < full else 0 for s, size, full in zip(self.shift_size, (down, right), x.shape[1:3], strict=True)
        ]
        rolled = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        tall, wide = rolled.size(1) // down, rolled.size(2) // right
        windows = rolled.view(batch, tall, down, wide, right, -1).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        out = self._attend(windows, self._hidden(rolled, shift) if any(shift) else None)
        out = F.dropout(self.proj(out), self.dropout, self.training)
        out = out.view(batch, tall, wide, down, right, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return (out.roll(shift, (1, 2)) if any(shift) else out)[:, :height, :width].contiguous()

    def _attend(self, windows: Tensor, hidden: Tensor | None) -> Tensor:
        """Return `(windows, positions, channels)`; `hidden` is added to the scores of each window of an image."""
        qkv: Tensor = self._qkv(windows)
        q, k, v = qkv.view(*qkv.shape[:-1], 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if hidden is not None:
            by_image = scores.view(-1, hidden.size(0), *scores.shape[1:])
            scores = (by_image + hidden.unsqueeze(1)).view(scores.shape)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        attended: Tensor = weights @ v
        return attended.transpose(1, 2).flatten(2)

    def _qkv(self, windows: Tensor) -> Tensor:
        made: Tensor = self.qkv(windows)
        return made

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scaled: Tensor = q * self.head_dim**-0.5
        return scaled @ k.transpose(-2, -1)

    def _hidden(self, rolled: Tensor, shift: list[int]) -> Tensor:
        """Return what is added where two positions of a window come from regions that do not touch."""
        down, right = self.window_size
        rows, columns = (
            (torch.arange(full) >= full - size).long() + (torch.arange(full) >= full - s).long()
            for full, size, s in zip(rolled.shape[1:3], (down, right), shift, strict=True)
        )
        regions = (3 * rows[:, None] + columns).view(-1, down, columns.numel() // right, right)
        region = regions.transpose(1, 2).flatten(2).flatten(0, 1)
        apart = region[:, :, None] != region[:, None, :]
        return torch.zeros(apart.shape).masked_fill(apart, -100.0).to(rolled)


class CosineWindowAttention(WindowAttention, ShiftedWindowAttentionV2):  # type: ignore[misc]
    """Attention within windows by the angle between queries and keys, as in the second version."""

    def get_relative_position_bias(self) -> Tensor:
        """Return the bias that a small network makes of log-spaced distances: `(1, heads, positions, positions)`."""
        positions = self.window_size[0] * self.window_size[1]
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        bias = table[self.relative_position_index].view(positions, positions, -1)
        return 16 * torch.sigmoid(bias.permute(2, 0, 1).unsqueeze(0))

    def _qkv(self, windows: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is not None:  # keys have none
            q, k, v = bias.chunk(3)
            bias = torch.cat([q, torch.zeros_like(k), v])
        return F.linear(windows, self.qkv.weight, bias)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scaled: Tensor = cosines * self.logit_scale.clamp(max=math.log(100.0)).exp()
        return scaled


class GridAttention(RelativePositionalMultiHeadAttention):  # type: ignore[misc]
    """Attention within the windows or along the grids of MaxViT: `(N, groups, positions, C)` to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each group."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(2, 3) for t in self.to_qkv(x).chunk(3, -1))
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        merged: Tensor = self.merge((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))
        return merged


FREED = (WindowAttention, GridAttention)
