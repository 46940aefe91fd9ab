"""Residual networks for CIFAR, depths 6n + 2 (He et al., CVPR 2016, section 4.2)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from prunekit.models.common import conv1x1, conv3x3, initialise, scaled
from prunekit.nn.channels import ChannelPad

Shortcut = Literal["pad", "conv"]
ReluOrder = Literal["output", "input"]


class PadShortcut(nn.Module):
    """The parameter-free shortcut (option A): every `stride`-th pixel, zero channels on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (outputs - inputs) // 2
        self.pad = ChannelPad(before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, outputs, H / stride, W / stride)`."""
        padded: Tensor = self.pad(x[:, :, :: self.stride, :: self.stride])
        return padded


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut.

    With `relu="output"` a ReLU follows the addition. With `relu="input"` (Kim et al., NeurIPS 2020) the block
    applies it to what it reads, on both branches, so that the stream between blocks carries plain sums.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut, relu: ReluOrder) -> None:
        super().__init__()
        self.relu_in = nn.ReLU() if relu == "input" else nn.Identity()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, shortcut)
        self.relu_out = nn.ReLU() if relu == "output" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, outputs, H / stride, W / stride)`."""
        x = self.relu_in(x)
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu_out(out + self.downsample(x))
        return result


class CifarResNet(nn.Module):
    """`(N, in_channels, 32, 32)` -> `(N, num_classes)`: a stem and three stages of `(depth - 2) / 6` blocks.

    `shortcut` is `pad` (parameter-free) or `conv` (1×1 convolution and batch norm) where a stage changes the
    shape; `relu` says where the blocks' ReLU stands, see `BasicBlock`. `width` multiplies the channels (16,
    32, 64).
    """

    def __init__(
        self,
        *,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        shortcut: Shortcut = "pad",
        relu: ReluOrder = "output",
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        channels = scaled(16, width)
        self.conv1 = conv3x3(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU() if relu == "output" else nn.Identity()
        stages: list[nn.Sequential] = []
        for outputs, stride in ((scaled(16, width), 1), (scaled(32, width), 2), (scaled(64, width), 2)):
            blocks = []
            for index in range((depth - 2) // 6):
                blocks.append(BasicBlock(channels, outputs, stride if index == 0 else 1, shortcut, relu))
                channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.relu_out = nn.ReLU() if relu == "input" else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores, `(N, num_classes)`."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu_out(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(self.avgpool(x).flatten(1))
        return scores


def _shortcut(inputs: int, outputs: int, stride: int, kind: Shortcut) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(inputs, outputs, stride)
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
