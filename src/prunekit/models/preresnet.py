"""Pre-activation residual networks for CIFAR: with bottlenecks (He et al., ECCV 2016), and wide ones."""

from __future__ import annotations

from torch import Tensor, nn

from prunekit.models.common import conv1x1, conv3x3, initialise, scaled


class PreBottleneck(nn.Module):
    """Batch norm, ReLU and convolution, three times (1×1, 3×3, 1×1), added to the stream it reads.

    The shortcut reads the raw stream, as in the networks that Network Slimming was published with.
    """

    def __init__(self, inputs: int, planes: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv1x1(inputs, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn3 = nn.BatchNorm2d(planes)
        self.relu3 = nn.ReLU()
        self.conv3 = conv1x1(planes, outputs)
        same = stride == 1 and inputs == outputs
        self.downsample = nn.Identity() if same else nn.Sequential(conv1x1(inputs, outputs, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, outputs, H / stride, W / stride)`."""
        out = self.conv1(self.relu1(self.bn1(x)))
        out = self.conv2(self.relu2(self.bn2(out)))
        out = self.conv3(self.relu3(self.bn3(out)))
        result: Tensor = out + self.downsample(x)
        return result


class PreResNet(nn.Module):
    """`(N, in_channels, 32, 32)` -> `(N, num_classes)`: three stages of `(depth - 2) / 9` bottlenecks."""

    def __init__(
        self,
        *,
        depth: int = 164,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        gamma: float = 0.5,
    ) -> None:
        super().__init__()
        channels = scaled(16, width)
        self.conv1 = conv3x3(in_channels, channels)
        stages: list[nn.Sequential] = []
        for planes, stride in ((scaled(16, width), 1), (scaled(32, width), 2), (scaled(64, width), 2)):
            blocks = []
            for index in range((depth - 2) // 9):
                blocks.append(PreBottleneck(channels, planes, 4 * planes, stride if index == 0 else 1))
                channels = 4 * planes
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores, `(N, num_classes)`."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        scores: Tensor = self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))
        return scores


class WideBlock(nn.Module):
    """Two pre-activated 3×3 convolutions; a shortcut that changes the shape reads the activated stream."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else conv1x1(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, outputs, H / stride, W / stride)`."""
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        result: Tensor = out + (x if self.downsample is None else self.downsample(active))
        return result


class WideResNet(nn.Module):
    """`(N, in_channels, 32, 32)` -> `(N, num_classes)`: WRN (Zagoruyko & Komodakis, BMVC 2016)."""

    def __init__(
        self,
        *,
        depth: int = 40,
        widen: int = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        channels = scaled(16, width)
        self.conv1 = conv3x3(in_channels, channels)
        stages: list[nn.Sequential] = []
        for planes, stride in ((16, 1), (32, 2), (64, 2)):
            outputs = scaled(planes * widen, width)
            blocks = []
            for index in range((depth - 4) // 6):
                blocks.append(WideBlock(channels, outputs, stride if index == 0 else 1))
                channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores, `(N, num_classes)`."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        scores: Tensor = self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))
        return scores
