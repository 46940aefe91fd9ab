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
        picture = _fitted(picture, shape)
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


def geometry(picture: Image.Image, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Return the size, `(width, height)`, that a picture is scaled to for `shape`, and the box that is cut from it."""
    _, height, width = shape
    if picture.size == (width, height):
        return picture.size, (0, 0, width, height)
    scale = max(height / picture.height, width / picture.width)
    if scale * _MARGIN < 1 + 1e-6:  # pictures of exactly the larger size are common
        scale *= _MARGIN
    # Rounded down, as torchvision does; the small term catches products such as 255.99….
    tall, wide = max(height, int(picture.height * scale + 1e-6)), max(width, int(picture.width * scale + 1e-6))
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return (wide, tall), (left, top, left + width, top + height)


def _fitted(picture: Image.Image, shape: tuple[int, ...]) -> Image.Image:
    from torchvision.transforms.v2 import functional as V

    (width, height), box = geometry(picture, shape)
    resized: Image.Image = V.resize(picture, [height, width])
    return resized.crop(box)


def _array(picture: Image.Image) -> Pixels:
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
