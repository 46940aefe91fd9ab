"""torchvision's classification data sets, by name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prunekit.data.images import ImageSet
from prunekit.data.pictures import Pictures, UnreadablePictureError, from_arrays
from prunekit.data.shapes import CIFAR10, IMAGENET, PHOTO, fit_spec
from prunekit.data.splits import held_out
from prunekit.errors import InputError
from prunekit.spec import InputSpec

_TRAIN_FLAG: Mapping[str, Mapping[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TRAIN_TEST: Mapping[str, Mapping[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST: Mapping[str, Mapping[str, Any]] = {**_TRAIN_TEST, "val": {"split": "val"}}
_TRAIN_VALID_TEST: Mapping[str, Mapping[str, Any]] = {**_TRAIN_TEST, "val": {"split": "valid"}}
_PHOTO = InputSpec(PHOTO, *IMAGENET)


@dataclass(frozen=True)
class _Named:
    """A class of `torchvision.datasets`, the arguments that choose its splits, and the input for its images.

    A split that is not in `splits` is taken from another: "val" is held out from "train", "test" is "val".
    """

    cls: str
    splits: Mapping[str, Mapping[str, Any]]
    spec: InputSpec = _PHOTO
    mirrors: bool = True
    download: bool = True
    classes: tuple[str, ...] = ()
    also: Mapping[str, Any] = field(default_factory=dict)


def _grey(side: int, mean: float, std: float) -> InputSpec:
    return InputSpec((1, side, side), (mean,), (std,))


_DIGITS = tuple(str(digit) for digit in range(10))

# Normalisation: mean and standard deviation of each training set, as is usual for it.
_TABLE: dict[str, _Named] = {
    "cifar10": _Named("CIFAR10", _TRAIN_FLAG, InputSpec((3, 32, 32), *CIFAR10)),
    "cifar100": _Named(
        "CIFAR100", _TRAIN_FLAG, InputSpec((3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    ),
    "mnist": _Named("MNIST", _TRAIN_FLAG, _grey(28, 0.1307, 0.3081), mirrors=False),
    "fashionmnist": _Named("FashionMNIST", _TRAIN_FLAG, _grey(28, 0.2860, 0.3530)),
    "kmnist": _Named("KMNIST", _TRAIN_FLAG, _grey(28, 0.1918, 0.3483), mirrors=False),
    "qmnist": _Named("QMNIST", _TRAIN_FLAG, _grey(28, 0.1307, 0.3081), mirrors=False),
    "emnist": _Named("EMNIST", _TRAIN_FLAG, _grey(28, 0.1751, 0.3332), mirrors=False, also={"split": "balanced"}),
    "usps": _Named("USPS", _TRAIN_FLAG, _grey(16, 0.2469, 0.2989), mirrors=False, classes=_DIGITS),
    "svhn": _Named(
        "SVHN",
        _TRAIN_TEST,
        InputSpec((3, 32, 32), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        mirrors=False,
        classes=_DIGITS,
    ),
    "stl10": _Named("STL10", _TRAIN_TEST, InputSpec((3, 96, 96), (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713))),
    "imagenet": _Named("ImageNet", {"train": {"split": "train"}, "val": {"split": "val"}}, download=False),
    "imagenette": _Named("Imagenette", {"train": {"split": "train"}, "val": {"split": "val"}}),
    "country211": _Named("Country211", _TRAIN_VALID_TEST),
    "dtd": _Named("DTD", _TRAIN_VAL_TEST),
    "fgvcaircraft": _Named("FGVCAircraft", _TRAIN_VAL_TEST),
    "flowers102": _Named("Flowers102", _TRAIN_VAL_TEST),
    "food101": _Named("Food101", _TRAIN_TEST),
    "gtsrb": _Named("GTSRB", _TRAIN_TEST, mirrors=False, classes=tuple(str(sign) for sign in range(43))),
    "oxfordiiitpet": _Named("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "pcam": _Named("PCAM", _TRAIN_VAL_TEST, classes=("normal", "tumour")),
    "renderedsst2": _Named("RenderedSST2", _TRAIN_VAL_TEST, mirrors=False),
}


def names() -> list[str]:
    """Return the names that `open_data` accepts besides folders."""
    return ["digits", *_TABLE]


def is_named(name: str) -> bool:
    """Return whether `open_data` takes `name` for a data set, before it looks for a folder."""
    return plain(name) in names()


def plain(name: str) -> str:
    """Return `name` as the table spells it: "torchvision:Fashion-MNIST" is "fashionmnist"."""
    return name.lower().removeprefix("torchvision:").replace("-", "").replace("_", "")


def named(
    name: str, split: str, root: Path | None, asked: InputSpec | None, *, resize: bool = True, lazy: bool = False
) -> ImageSet:
    """Return the torchvision data set of that (plain) name under `root`, downloading it where it is missing."""
    entry = _TABLE[name]
    if root is None:
        raise InputError(
            f"no folder given for the data set {name}",
            hint="--data-root FOLDER says where it lies, or may be downloaded to",
        )
    stored = "val" if split == "test" and "test" not in entry.splits else split
    held = stored not in entry.splits or (split == "train" and "val" not in entry.splits)
    dataset = _construct(name, entry, entry.splits["train" if held else stored], root)
    labels = _labels(dataset)
    index = held_out(labels, split, name=name) if held else torch.arange(len(labels))
    spec = fit_spec(asked, entry.spec, fixed=not resize and entry.spec.shape != PHOTO)
    classes = entry.classes or tuple(str(c) for c in getattr(dataset, "classes", ()))
    classes = classes or tuple(str(c) for c in range(int(labels.max()) + 1))
    pixels = _pixels(dataset)
    if pixels is not None:
        images = from_arrays(name, split, pixels[index], labels[index], classes, spec, mirrors=entry.mirrors)
        return replace(images, held_out=held and split == "val")

    def picture(i: int) -> Image.Image:
        try:
            opened: Image.Image = dataset[int(index[i])][0]
        except (OSError, ValueError, SyntaxError) as error:
            raise UnreadablePictureError(f"image {int(index[i])} of {name} cannot be read: {error}") from error
        return opened

    place = f"image {{}} of {name}".format
    pictures = Pictures(name, split, picture, place, labels[index], classes, spec, entry.mirrors)
    return replace(pictures.image_set(lazy=lazy), held_out=held and split == "val")


def _construct(name: str, entry: _Named, arguments: Mapping[str, Any], root: Path) -> Any:
    from torchvision import datasets

    download = {"download": True} if entry.download else {}
    try:
        # torchvision reports downloads on stdout, which is for data.
        with contextlib.redirect_stdout(sys.stderr):
            return getattr(datasets, entry.cls)(str(root), **arguments, **entry.also, **download)
    except (OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the data set {name} cannot be read from {root}, nor downloaded: {reason}",
            hint=f"put the files there as torchvision.datasets.{entry.cls} expects them",
        ) from error


def _labels(dataset: Any) -> Tensor:
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(dataset, attribute, None)
        if values is not None:
            labels = torch.as_tensor(values).to(torch.int64)
            return labels[:, 0] if labels.ndim == 2 else labels  # QMNIST keeps the writer beside the digit
    samples = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    if samples is not None:
        return torch.tensor([int(label) for _, label in samples])
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


def _pixels(dataset: Any) -> Tensor | None:
    """Return the images as `(N, C, H, W)` uint8 where torchvision holds them in memory, else None."""
    data = getattr(dataset, "data", None)
    if data is None:
        return None
    images = torch.as_tensor(data)
    if images.ndim == 3:
        return images[:, None]
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2).contiguous()
