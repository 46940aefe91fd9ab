"""VGG with batch norm for small images (Simonyan & Zisserman, ICLR 2015), in Network Slimming's form."""

from __future__ import annotations

from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.models.common import conv3x3, initialise, scaled

VGG11 = "64-M-128-M-256-256-M-512-512-M-512-512"
VGG13 = "64-64-M-128-128-M-256-256-M-512-512-M-512-512"
VGG16 = "64-64-M-128-128-M-256-256-256-M-512-512-512-M-512-512-512"
VGG19 = "64-64-M-128-128-M-256-256-256-256-M-512-512-512-512-M-512-512-512-512"
VGG_DIGITS = "32-32-M-64-64-M-128-128"


class CifarVGG(nn.Module):
    """VGG with batch norm: `(N, in_channels, H, W)` -> `(N, num_classes)`.

    `config` lists the layers, joined by `-`: a number is a 3×3 convolution with that many channels (times `width`), its
    batch norm and ReLU; `M` halves the image. A global average precedes the one linear layer.
    """

    def __init__(
        self,
        *,
        config: str = VGG16,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        gamma: float = 0.5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for item in _parse_config(config):
            if item is None:
                layers.append(nn.MaxPool2d(2))
                continue
            outputs = scaled(item, width)
            layers += [conv3x3(channels, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores, `(N, num_classes)`."""
        scores: Tensor = self.fc(self.avgpool(self.features(x)).flatten(1))
        return scores


def _parse_config(config: str) -> list[int | None]:
    """Return the channels of each convolution in order; None stands for a pooling."""
    items = config.split("-")
    if not all(item == "M" or (item.isdecimal() and int(item) > 0) for item in items) or set(items) == {"M"}:
        raise InputError(
            f"config '{config}' is not a list of channel counts and M",
            hint=f"for example config={VGG_DIGITS}",
        )
    return [None if item == "M" else int(item) for item in items]
