"""Modules in place of functions whose channel counts a forward would hard-code: surgery edits their attributes."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelPad(nn.Module):
    """Padding with zero channels: `(N, C, H, W)` -> `(N, before + C + after, H, W)`.

    The parameter-free shortcut of the CIFAR residual networks (He et al., CVPR 2016, option A). It is a module because
    the two widths must shrink with the stream that the result is added to.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """Pad dimension 1."""
        return F.pad(x, (0, 0) * (x.dim() - 2) + (self.before, self.after))

    def extra_repr(self) -> str:
        """Return both widths, for `repr`."""
        return f"before={self.before}, after={self.after}"


class ChannelSelect(nn.Module):
    """Selection of some channels of a stream: `(N, C, H, W)` -> `(N, len(index), H, W)`.

    Stands in front of the batch norm of a pre-activation block that lost channels which the stream must keep for its
    other readers (Liu et al., ICCV 2017, section 3.3).
    """

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index.to(torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Select along dimension 1."""
        return x.index_select(1, self.index)

    def extra_repr(self) -> str:
        """Return the number of channels read, for `repr`."""
        return f"channels={self.index.numel()}"


class SelectedNorm(nn.Sequential):
    """Batch norm behind a channel selection, in place of the batch norm alone."""

    def __init__(self, norm: nn.Module, index: Tensor) -> None:
        super().__init__(OrderedDict(select=ChannelSelect(index), norm=norm))
