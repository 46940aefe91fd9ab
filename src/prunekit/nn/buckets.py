"""Table of the static sub-networks of a gated network, and the router that chooses among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.errors import InputError

NAME = "buckets"  # the submodule of a gated network that holds the table
_SIDE = 32  # pixels that the router reduces images to
_WIDTHS = (16, 32)


class Router(nn.Module):
    """Two small convolutions that choose a sub-network for each image: `(N, C, H, W)` -> logits `(N, buckets)`."""

    def __init__(self, channels: int, buckets: int) -> None:
        super().__init__()
        first, second = _WIDTHS
        self.conv1 = nn.Conv2d(channels, first, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.fc = nn.Linear(second, buckets)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, `(N, buckets)`."""
        if x.size(2) > _SIDE or x.size(3) > _SIDE:
            x = F.adaptive_avg_pool2d(x, _SIDE)
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        scores: Tensor = self.fc(x.flatten(2).mean(2))
        return scores


class BucketTable(nn.Module):
    """Constant saliency of every gated channel in each of K sub-networks, zero where the channel is removed.

    `scales` is `(K, channels)`, over the gated layers in order. The network's own forward does not use it.
    """

    scales: Tensor

    def __init__(self, buckets: int, channels: int, images: int) -> None:
        super().__init__()
        self.router = Router(images, buckets)
        self.register_buffer("scales", torch.zeros(buckets, channels))


def describe_buckets(model: nn.Module) -> dict[str, int] | None:
    """Return the sizes of a network's bucket table as JSON, or None where it has none."""
    table = getattr(model, NAME, None)
    if not isinstance(table, BucketTable):
        return None
    buckets, channels = table.scales.shape
    return {"buckets": buckets, "channels": channels, "images": table.router.conv1.in_channels}


def restore_buckets(model: nn.Module, described: Any, shapes: Mapping[str, Any]) -> None:
    """Add an empty table of the sizes that `describe_buckets` returned, in place.

    Args:
        model: The gated network.
        described: The sizes, or None to add nothing.
        shapes: The shapes of the weights at hand, by name.

    Raises:
        InputError: `described` is no description of a table, or does not match the weights.
    """
    if described is None:
        return
    try:
        buckets, channels, images = (int(described[name]) for name in ("buckets", "channels", "images"))
        read = shapes[f"{NAME}.router.conv1.weight"][1:2]
        if min(buckets, channels, images) < 1 or [buckets, channels, images] != [*shapes[f"{NAME}.scales"], *read]:
            raise ValueError("sizes other than those of the weights")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the file describes sub-networks that cannot be: {error}") from error
    with next(model.parameters()).device:
        model.add_module(NAME, BucketTable(buckets, channels, images))
