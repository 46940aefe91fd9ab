"""Images that a method restores from, or reads a loss on."""

from __future__ import annotations

from prunekit.data import ImageSet
from prunekit.errors import InputError
from prunekit.methods import registry
from prunekit.restoration.images import Images, LabelledImages

_BATCH = 64  # labelled images: a gradient is averaged over so many


def drawn(name: str, train_set: ImageSet, count: int, seed: int = 0) -> Images | LabelledImages:
    """Return `count` normalised training images for the method `name`, drawn by `seed`.

    Without their labels, as one tensor `(N, C, H, W)`; as batches with labels for a method that reads them.

    Raises:
        InputError: Fewer than one image was asked for.
    """
    chosen = sampled(train_set, count, seed)
    if registry.get(name).labelled:
        return list(chosen.batches(_BATCH))
    return chosen.inputs()


def sampled(train_set: ImageSet, count: int, seed: int = 0) -> ImageSet:
    """Return `count` training images, drawn by `seed`.

    Raises:
        InputError: Fewer than one image was asked for.
    """
    if count < 1:
        raise InputError(f"--calibration must be at least 1, not {count}")
    return train_set.sample(min(count, len(train_set)), seed=seed)
