"""Folders of images with masks: `train/`, `val/` or `test/`, each with `images/` and `masks/` of the same names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prunekit.data.augment import augmentation
from prunekit.data.examples import Examples
from prunekit.data.folder import SUFFIXES, open_picture
from prunekit.data.prepare import prepare
from prunekit.data.randomness import seeded
from prunekit.data.shapes import CIFAR10, IMAGENET, fit_spec, fits_in_memory
from prunekit.errors import InputError
from prunekit.progress import counter
from prunekit.spec import InputSpec

IGNORED = 255  # in a mask: belongs to no class
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_MASKS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm")  # formats without loss
_SMALL = 64


@dataclass(frozen=True, eq=False)
class MaskedImages(Examples):
    """Images `(N, C, H, W)` and masks `(N, H, W)`, both uint8: in a mask, a pixel is the number of its class, or 255.

    `task` is what they are for.
    """

    noun: ClassVar[str] = "image"

    name: str
    split: str
    images: Tensor = field(repr=False)
    masks: Tensor = field(repr=False)
    input_spec: InputSpec
    task: Any = field(repr=False, default=None)
    held_out: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: Tensor | Sequence[int]) -> MaskedImages:
        """Return the images at `index` as a set, in that order."""
        index = torch.as_tensor(index, dtype=torch.int64)
        return replace(self, images=self.images[index], masks=self.masks[index])

    def batches(
        self,
        batch_size: int = 256,
        *,
        device: torch.device | str = "cpu",
        order: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images `(n, C, H, W)` and masks `(n, H, W)` of whole numbers; see `Examples.batches`."""
        order = torch.arange(len(self)) if order is None else order.cpu()
        for index in torch.split(order, batch_size) if len(order) else ():
            yield self._batch(self.images[index], self.masks[index], device, dtype)

    def views(
        self,
        batch_size: int,
        order: Tensor,
        *,
        seed: Sequence[int],
        augment: str = "auto",
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches for training: images and masks are moved alike, and what comes from outside belongs to no
        class. By default they are shifted and mirrored.

        Raises:
            InputError: An augmentation that changes sizes, which masks do not survive.
        """
        chosen = augmentation("cifar" if augment == "auto" else augment)
        if chosen.whole:
            raise InputError(f"--augment {chosen.name} resizes, which masks cannot take", hint="cifar, shift or none")
        draws = chosen.draws(len(self), seeded(*seed))
        for index in torch.split(order.cpu(), batch_size) if len(order) else ():
            # A mask goes along as one more channel, its classes from 1: what is padded with 0 belongs to none.
            both = torch.cat([self.images[index], (self.masks[index] + 1)[:, None]], 1)
            seen = chosen.view(both, draws[index])
            images, masks = self._batch(seen[:, :-1], seen[:, -1] - 1, device, dtype)
            yield images.contiguous(memory_format=torch.channels_last) if channels_last else images, masks

    def identity(self) -> bytes:
        """Return what tells these images from others: how they are read, and their masks."""
        return repr(self.input_spec.to_json()).encode() + self.masks.numpy().tobytes()

    def _batch(
        self, images: Tensor, masks: Tensor, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        pixels = images.to(device, dtype).div_(255)
        mean, std = (torch.tensor(v, dtype=dtype, device=device) for v in (self.input_spec.mean, self.input_spec.std))
        return pixels.sub_(mean[:, None, None]).div_(std[:, None, None]), masks.to(device, torch.int64)


def masked_folder(root: Path, split: str, asked: InputSpec | None, task: Any = None) -> MaskedImages:
    """Return the images and masks of `split` under `root`.

    "test" falls back to `val/`; where there is no `val/`, "val" is every tenth training image, which "train" then
    leaves out.

    Raises:
        InputError: A folder is missing, an image has no mask or one of another size, or nothing says how large the
            input is.
    """
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    found = {part: root / name for part, names in _SPLITS.items() for name in names if (root / name).is_dir()}
    place = found.get(split) or found.get({"test": "val", "val": "train"}.get(split, ""))
    if place is None:
        raise InputError(f"{root} has no {split}/", hint="expected train/ and val/ or test/, with images/ and masks/")
    pairs = _pairs(place)
    held = split != "test" and "val" not in found
    if held:
        pairs = [pair for i, pair in enumerate(pairs) if (i % 10 == 9) == (split == "val")]
        if not pairs:
            raise InputError(f"{place} has too few images to hold some out for validation", hint="add a folder val/")
    spec = _spec(pairs, asked)
    if not fits_in_memory(len(pairs), InputSpec((spec.shape[0] + 1, *spec.shape[1:]))):
        raise InputError(f"the images of {place} do not fit into memory", hint="a smaller --input-size needs less")
    images, masks = _read(pairs, spec)
    return MaskedImages(str(root), split, images, masks, spec, task, held_out=held and split == "val")


def _pairs(place: Path) -> list[tuple[Path, Path]]:
    images, masks = place / "images", place / "masks"
    for folder in (images, masks):
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}", hint="images and masks of the same names lie side by side")
    by_name = {path.stem: path for path in sorted(masks.iterdir()) if path.suffix.lower() in _MASKS}
    found = [path for path in sorted(images.iterdir()) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise InputError(f"no images in {images}", hint=f"expected files {' '.join(sorted(SUFFIXES))}")
    bare = next((path for path in found if path.stem not in by_name), None)
    if bare is not None:
        raise InputError(f"{bare} has no mask", hint=f"expected {masks / bare.stem}.png")
    return [(path, by_name[path.stem]) for path in found]


def _spec(pairs: Sequence[tuple[Path, Path]], asked: InputSpec | None) -> InputSpec:
    """Return the input: as asked, else the size that a sample of the images agrees on."""
    if asked is not None:
        native = InputSpec(asked.shape, *(IMAGENET if min(asked.shape[1:]) > _SMALL else CIFAR10))
        return fit_spec(asked, native)
    shapes = set()
    for path, _ in pairs[:: max(1, len(pairs) // 20)]:
        with open_picture(str(path)) as picture:
            shapes.add((1 if picture.mode in ("1", "L") else 3, picture.height, picture.width))
    if len(shapes) > 1:
        raise InputError("the images have several sizes", hint="say to which they are resized: --input-size 3x256x256")
    shape = shapes.pop()
    return fit_spec(InputSpec(shape), InputSpec(shape, *(IMAGENET if min(shape[1:]) > _SMALL else CIFAR10)))


def _read(pairs: Sequence[tuple[Path, Path]], spec: InputSpec) -> tuple[Tensor, Tensor]:
    images = np.empty((len(pairs), *spec.shape), dtype=np.uint8)
    masks = np.empty((len(pairs), *spec.shape[1:]), dtype=np.uint8)
    count = counter("reading images")
    for number, (image, mask) in enumerate(pairs):
        with open_picture(str(image)) as picture, open_picture(str(mask)) as classes:
            if picture.size != classes.size:
                raise InputError(f"{image} has {picture.size[0]}x{picture.size[1]} pixels, and its mask {mask} others")
            if classes.mode not in ("L", "P", "1"):
                raise InputError(
                    f"{mask} is a picture of mode {classes.mode}, expected one byte for each pixel: its class",
                    hint="a mask holds the numbers of classes from 0, and 255 for pixels that belong to none",
                )
            images[number], masks[number] = prepare(picture, spec.shape), _fitted(classes, spec.shape)
        count(number + 1, len(pairs))
    return torch.from_numpy(images), torch.from_numpy(masks)


def _fitted(mask: Image.Image, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a mask scaled and cropped as `prepare` does its image, each pixel with the class of the nearest."""
    from prunekit.data.prepare import geometry

    whole = Image.fromarray(np.asarray(mask).astype(np.uint8))
    size, box = geometry(whole, shape)
    return np.asarray(whole.resize(size, Image.Resampling.NEAREST).crop(box))
