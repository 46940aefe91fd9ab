"""Preparing a decoded picture: to the `(C, H, W)` uint8 array of the network's input."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from prunekit.data.augment import crop_boxes

# ImageNet's evaluation: the shorter side to 256, then the central 224.
_MARGIN = 256 / 224
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def prepare(picture: Image.Image, shape: tuple[int, ...]) -> Pixels:
    """Return the picture in the colours and size of `shape`, `(C, H, W)`.

    A picture of another size is scaled with its proportions kept, and its centre is cropped. Where that shrinks it, a
    margin is cropped too, as is usual for ImageNet.
    """
    channels, height, width = shape
    picture = _coloured(picture, channels)
    if picture.size != (width, height):
        picture = _fitted(picture, height, width)
    return _array(picture)


def prepare_crop(picture: Image.Image, shape: tuple[int, ...], draws: Tensor) -> Pixels:
    """Return a random crop of the picture at the size of `shape`, for the five draws of `augment.resized_crop`."""
    from torchvision.transforms.v2 import functional as V

    channels, height, width = shape
    picture = _coloured(picture, channels)
    box = crop_boxes(draws[None], picture.height, picture.width)
    top, left, tall, wide = (int(edge) for edge in box)
    part = V.resized_crop(picture, top, left, tall, wide, [height, width])
    return _array(V.horizontal_flip(part) if draws[4] < 0.5 else part)


def _coloured(picture: Image.Image, channels: int) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip rather than scale
        deep = np.asarray(picture, dtype=np.int64) >> 8
        picture = Image.fromarray(deep.clip(0, 255).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("L" if channels == 1 else "RGB")


def _fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    from torchvision.transforms.v2 import functional as V

    scale = max(height / picture.height, width / picture.width)
    if scale * _MARGIN < 1 + 1e-6:  # pictures of exactly the larger size are common
        scale *= _MARGIN
    # Rounded down, as torchvision does; the small term catches products such as 255.99….
    size = [max(height, int(picture.height * scale + 1e-6)), max(width, int(picture.width * scale + 1e-6))]
    cut: Image.Image = V.center_crop(V.resize(picture, size), [height, width])
    return cut


def _array(picture: Image.Image) -> Pixels:
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
