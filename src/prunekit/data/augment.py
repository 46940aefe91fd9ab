"""Random augmentation of training images, a whole batch at once on the tensor's own device.

Every random number comes from outside, as a row of `draws` uniform in [0, 1): the same row gives the same view, in any
batch, process or thread. (`torchvision.transforms.v2` draws once for a whole batch, from the global generator.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit.errors import unknown_name


@dataclass(frozen=True)
class Augmentation:
    """Named way of changing `(N, C, H, W)` uint8 images by `(N, columns)` uniform draws.

    `whole` says that the view is better cut from the whole picture, at its original size, where that is at hand.
    """

    name: str
    columns: int
    view: Callable[[Tensor, Tensor], Tensor]
    whole: bool = False

    def draws(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `(count, columns)` random numbers for `count` images."""
        return torch.rand(count, self.columns, generator=generator)


def shift(images: Tensor, draws: Tensor) -> Tensor:
    """Pad with black by an eighth of the side (4 pixels of 32) and crop the original size at random (two draws)."""
    rows, columns, padded = _shifted(images, draws)
    return _gather(padded, rows, columns)


def shift_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Apply `shift` and mirror half of the images (three draws): the usual recipe for CIFAR."""
    rows, columns, padded = _shifted(images, draws)
    columns = torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
    return _gather(padded, rows, columns)


def resized_crop(images: Tensor, draws: Tensor) -> Tensor:
    """Resize a random crop of each image to the full size and mirror half of them (five draws): ImageNet's recipe."""
    height, width = images.shape[-2:]
    top, left, tall, wide = crop_boxes(draws, height, width)
    mirror = torch.where(draws[:, 4] < 0.5, -1.0, 1.0)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = mirror * wide / width
    theta[:, 0, 2] = (2 * left + wide) / width - 1
    theta[:, 1, 1] = tall / height
    theta[:, 1, 2] = (2 * top + tall) / height - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    views = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return views.round_().clamp_(0, 255).to(torch.uint8)


def crop_boxes(draws: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return top, left, height and width in pixels of random crops: 8 to 100 % of the area, sides 3:4 to 4:3.

    Szegedy et al., "Going Deeper with Convolutions", 2015. A box that sticks out is clipped to the picture instead of
    drawn again, so every image costs four draws.
    """
    area = (0.08 + 0.92 * draws[:, 0]) * height * width
    ratio = torch.exp((2 * draws[:, 1] - 1) * math.log(4 / 3))
    wide = (area * ratio).sqrt().round().clamp(1, width)
    tall = (area / ratio).sqrt().round().clamp(1, height)
    top = (draws[:, 2] * (height - tall + 1)).floor()
    left = (draws[:, 3] * (width - wide + 1)).floor()
    return top, left, tall, wide


def _shifted(images: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    height, width = images.shape[-2:]
    y, x = max(1, height // 8), max(1, width // 8)
    top = (draws[:, 0:1] * (2 * y + 1)).long()
    left = (draws[:, 1:2] * (2 * x + 1)).long()
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    return rows, columns, F.pad(images, (x, x, y, y))


def _gather(padded: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    count, channels, _, width = padded.shape
    flat = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    views = padded.flatten(2).gather(2, flat[:, None, :].expand(-1, channels, -1))
    return views.view(count, channels, rows.shape[1], columns.shape[1])


def _same(images: Tensor, _draws: Tensor) -> Tensor:
    return images


AUGMENTATIONS: dict[str, Augmentation] = {
    a.name: a
    for a in (
        Augmentation("none", 0, _same),
        Augmentation("shift", 2, shift),
        Augmentation("cifar", 3, shift_flip),
        Augmentation("imagenet", 5, resized_crop, whole=True),
    )
}


def augmentation(name: str) -> Augmentation:
    """Return the augmentation of that name; raise `InputError` with the nearest names where there is none."""
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]
