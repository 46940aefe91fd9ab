"""Convolutions whose output channels follow the input (Tang et al., "Manifold Regularized Dynamic Network Pruning",
CVPR 2021).

Convolution, batch norm and gate are one module that stands in the convolution's place: no state passes between modules,
so that a gated network still traces, exports and copies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LIMIT = 1000.0  # the largest saliency


class Gate(nn.Module):
    """One saliency a channel and image: `pi = min(ReLU(W2 ReLU(W1 GAP(x)) + b2), 1000)`, `(N, C, ...)` -> `(N, out)`.

    Starts with `W2 = 0` and `b2 = 1`, so that every saliency is exactly one and the network is what it was.
    """

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, out)
        nn.init.zeros_(self.excite.weight)
        nn.init.ones_(self.excite.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Saliencies of the feature map `x`."""
        pooled = x.flatten(2).mean(2)
        return F.relu(self.excite(F.relu(self.squeeze(pooled)))).clamp(max=LIMIT)


class GatedConv(nn.Module):
    """`norm(conv(x)) * pi * [pi >= threshold and pi > 0]`: kept channels are scaled by their saliency, others are zero.

    `threshold` is one number for the layer; 0 lets every channel with a positive saliency through.
    """

    threshold: Tensor

    def __init__(self, conv: nn.Module, norm: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.gate = gate
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The gated, normalised feature map; its activation follows."""
        pi = self.gate(x)
        kept = torch.where((pi >= self.threshold) & (pi > 0), pi, torch.zeros_like(pi))
        y: Tensor = self.norm(self.conv(x))
        return y * kept.reshape(*kept.shape, *(1,) * (y.dim() - 2))
