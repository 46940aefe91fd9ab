"""DenseNet for CIFAR without bottlenecks, depth 3n + 4 (Huang et al., CVPR 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunekit.models.common import conv1x1, conv3x3, initialise, scaled


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3×3 convolution; its `growth` channels are appended to the stream."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv1 = conv3x3(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, inputs + growth, H, W)`."""
        return torch.cat((x, self.conv1(self.relu(self.bn1(x)))), 1)


class Transition(nn.Module):
    """Batch norm, ReLU, a 1×1 convolution that keeps the channels, and average pooling by two."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv1 = conv1x1(channels, channels)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, channels, H, W)` to `(N, channels, H / 2, W / 2)`."""
        pooled: Tensor = self.pool(self.conv1(self.relu(self.bn1(x))))
        return pooled


class CifarDenseNet(nn.Module):
    """`(N, in_channels, 32, 32)` -> `(N, num_classes)`: three dense blocks of `(depth - 4) / 3` layers."""

    def __init__(
        self,
        *,
        depth: int = 40,
        growth: int = 12,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        gamma: float = 0.5,
    ) -> None:
        super().__init__()
        growth = scaled(growth, width)
        layers = (depth - 4) // 3
        channels = 2 * growth
        self.conv1 = conv3x3(in_channels, channels)
        self.dense1 = _dense_block(channels, growth, layers)
        self.trans1 = Transition(channels := channels + layers * growth)
        self.dense2 = _dense_block(channels, growth, layers)
        self.trans2 = Transition(channels := channels + layers * growth)
        self.dense3 = _dense_block(channels, growth, layers)
        self.bn = nn.BatchNorm2d(channels := channels + layers * growth)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores, `(N, num_classes)`."""
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense3(self.trans2(self.dense2(x)))
        scores: Tensor = self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))
        return scores


def _dense_block(channels: int, growth: int, layers: int) -> nn.Sequential:
    return nn.Sequential(*(DenseLayer(channels + index * growth, growth) for index in range(layers)))
