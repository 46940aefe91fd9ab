"""Building blocks that the bundled architectures share."""

from __future__ import annotations

from torch import nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3×3 convolution without bias; at stride 1 it keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1×1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


def scaled(channels: int, width: float) -> int:
    """Return `channels` times `width`, rounded, and at least one."""
    return max(1, round(channels * width))


def initialise(model: nn.Module, gamma: float) -> None:
    """Initialise a network for training from scratch, in place.

    Convolutions follow He et al. (ICCV 2015, fan out); batch norms start at `gamma` and 0. Network Slimming starts its
    gammas at 0.5, so that the L1 penalty has less to undo (Liu et al., ICCV 2017).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, gamma)
            nn.init.zeros_(module.bias)
