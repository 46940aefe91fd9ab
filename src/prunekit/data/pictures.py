"""`Pictures`: a split as it is stored, before it becomes an `ImageSet`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prunekit.data.images import ImageSet
from prunekit.data.lazy import LazyImages
from prunekit.data.prepare import Pixels, prepare
from prunekit.data.shapes import fits_in_memory, suited_augmentation
from prunekit.errors import InputError
from prunekit.progress import counter
from prunekit.spec import InputSpec

_CHUNK = 256  # pictures per decoding task
_BIG = 128 * 128  # pixels above which decoding is slow enough for threads to pay off


class UnreadablePictureError(InputError):
    """Error for a picture file that cannot be decoded."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of any size with their labels, and the input (`spec`) that they become.

    `open(i)` returns picture `i` or raises `UnreadablePictureError`; `place(i)` describes its location.
    """

    name: str
    split: str
    open: Callable[[int], Image.Image]
    place: Callable[[int], str]
    labels: Tensor
    classes: tuple[str, ...]
    spec: InputSpec
    mirrors: bool = True

    def image_set(self, *, skip_bad: bool = False, lazy: bool = False) -> ImageSet:
        """Decode into memory where that fits; otherwise, if `lazy`, or for crops in training, decode on demand."""
        augment = suited_augmentation(self.spec, mirrors=self.mirrors)
        crops = augment == "imagenet" and self.split == "train"
        lazy = lazy or crops or not fits_in_memory(len(self.labels), self.spec)
        images, bad = self._lazy(skip_bad) if lazy else self._decoded(skip_bad)
        labels = self._without(bad, self.labels)
        skipped = tuple(self.place(i) for i in bad)
        return ImageSet(self.name, self.split, images, labels, self.classes, self.spec, augment, skipped)

    def _decoded(self, skip_bad: bool) -> tuple[Tensor | LazyImages, list[int]]:
        images = np.empty((len(self.labels), *self.spec.shape), dtype=np.uint8)
        bad: list[int] = []
        for i, pixels in enumerate(self._each(skip_bad)):
            if pixels is None:
                bad.append(i)
            else:
                images[i] = pixels
        return self._without(bad, torch.from_numpy(images)), bad

    def _lazy(self, skip_bad: bool) -> tuple[Tensor | LazyImages, list[int]]:
        # A bad picture met in the middle of training would change the batch: with `skip_bad` all are read once
        # here.
        bad = [i for i, pixels in enumerate(self._each(skip_bad)) if pixels is None] if skip_bad else []
        index = self._without(bad, torch.arange(len(self.labels)))
        return LazyImages(self.open, index, self.spec.shape), bad

    def _each(self, skip_bad: bool) -> Iterator[Pixels | None]:
        """Yield all pictures, None for those that cannot be read."""
        count = counter("reading images")
        for done, pixels in enumerate(self._decoded_each(skip_bad), start=1):
            yield pixels
            count(done, len(self.labels))

    def _decoded_each(self, skip_bad: bool) -> Iterator[Pixels | None]:
        chunks = [range(i, min(i + _CHUNK, len(self.labels))) for i in range(0, len(self.labels), _CHUNK)]

        def decode(chunk: range) -> list[Pixels | None]:
            return [self._pixels(i, skip_bad) for i in chunk]

        if not self._big():
            for chunk in chunks:
                yield from decode(chunk)
            return
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for pixels in pool.map(decode, chunks):
                yield from pixels

    def _pixels(self, i: int, skip_bad: bool) -> Pixels | None:
        try:
            with self.open(i) as picture:
                return prepare(picture, self.spec.shape)
        except UnreadablePictureError:
            if skip_bad:
                return None
            raise

    def _big(self) -> bool:
        try:
            with self.open(0) as picture:
                return picture.width * picture.height > _BIG
        except UnreadablePictureError:
            return False

    def _without(self, bad: list[int], values: Tensor) -> Tensor:
        if not bad:
            return values
        if len(bad) == len(values):
            raise InputError(f"none of the {len(bad)} pictures of {self.name} ({self.split}) can be read")
        keep = torch.ones(len(values), dtype=torch.bool)
        keep[bad] = False
        return values[keep]


def from_arrays(
    name: str,
    split: str,
    images: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    spec: InputSpec,
    *,
    mirrors: bool,
) -> ImageSet:
    """Make a set of uint8 images `(N, C, H, W)`, resized only where `spec` asks for another shape."""
    if images.shape[1:] == spec.shape:
        augment = suited_augmentation(spec, mirrors=mirrors)
        return ImageSet(name, split, images, labels, classes, spec, augment)

    def picture(i: int) -> Image.Image:
        pixels = images[i].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))

    stored = Pictures(name, split, picture, lambda i: f"image {i}", labels, classes, spec, mirrors)
    return stored.image_set()
