"""The input of a network: the user's wishes completed by the data set's own shape and normalisation."""

from __future__ import annotations

import os

from prunekit.errors import InputError, counted
from prunekit.spec import InputSpec

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PHOTO = (3, 224, 224)
_SMALL = 64  # sides up to this keep their size; larger pictures are treated as ImageNet's


def native_spec(channels: int, height: int, width: int) -> InputSpec:
    """Return the default input for pictures of that size: small ones keep it, others are treated as ImageNet's.

    Small pictures in colour are normalised as CIFAR-10, grey ones by the grey of ImageNet.
    """
    if max(height, width) > _SMALL:
        return InputSpec(PHOTO, *IMAGENET)
    if channels == 3:
        return InputSpec((channels, height, width), *CIFAR10)
    return InputSpec((channels, height, width), _grey(IMAGENET[0]), _grey(IMAGENET[1]))


def fit_spec(asked: InputSpec | None, native: InputSpec, *, fixed: bool = False) -> InputSpec:
    """Return `asked` completed by the data set's own normalisation, or `native` where nothing was asked for.

    Args:
        asked: The input that the user or the network asks for.
        native: The input that suits the images as they are.
        fixed: Refuse any other shape than that of the images.

    Raises:
        InputError: The shape is no image's, differs though it is fixed, or the normalisation does not fit its channels.
    """
    if asked is None:
        return native
    if len(asked.shape) != 3 or asked.shape[0] not in (1, 3) or min(asked.shape) < 1:
        raise InputError(
            f"images cannot be read as input of shape {tuple(asked.shape)}",
            hint="expected (C, H, W) with 1 or 3 channels",
        )
    if fixed and asked.shape != native.shape:
        have, want = ("x".join(map(str, spec.shape)) for spec in (native, asked))
        raise InputError(f"the images are {have}, the network reads {want}", hint=f"--input-size {want} resizes them")
    channels = asked.shape[0]
    mean = _channels(asked.mean or native.mean, channels, "mean")
    std = _channels(asked.std or native.std, channels, "std")
    if any(s <= 0 for s in std):
        raise InputError(f"standard deviations must be positive, got {std}")
    return InputSpec(tuple(asked.shape), mean, std)


def suited_augmentation(spec: InputSpec, *, mirrors: bool) -> str:
    """Return ImageNet's augmentation for photographs and CIFAR's for small images, unmirrored unless `mirrors`."""
    if min(spec.shape[1:]) > _SMALL:
        return "imagenet"
    return "cifar" if mirrors else "shift"


def fits_in_memory(count: int, spec: InputSpec) -> bool:
    """Return whether `count` uint8 images take at most 4 GiB and a third of this machine's memory."""
    channels, height, width = spec.shape
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    return count * channels * height * width <= min(4 << 30, memory // 3)


def _channels(values: tuple[float, ...], channels: int, what: str) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1:
        return tuple(values) * channels
    if channels == 1:
        return _grey(values)
    raise InputError(f"{what} has {len(values)} entries, the images have {counted(channels, 'channel')}")


def _grey(values: tuple[float, ...]) -> tuple[float, ...]:
    return (round(sum(values) / len(values), 4),)
