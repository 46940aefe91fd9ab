"""Held-out images: those that decide and those that report, split off once and used for nothing else.

A network knows by heart what it was trained on and loses less there than elsewhere, so neither are training images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prunekit.data import ImageSet
from prunekit.data.splits import LEFT_OUT, every
from prunekit.errors import InputError

_EVEN = frozenset({0, 2, 4, 6, 8})
_LOOKED_AT = 8  # images by which two sets are told apart


@dataclass(frozen=True)
class HeldOut:
    """Images that decide whether a candidate meets a goal, and others that tell what the chosen one has lost.

    `said` tells people in one line which these are.
    """

    decide: ImageSet
    report: ImageSet
    said: str


def hold_out(val: ImageSet, test: ImageSet, seed: int | None = None) -> HeldOut:
    """Return the images that decide and report.

    Validation images of their own decide, and the test images report. Where validation images are a part of those for
    training, or are the test images, one half of the test images of each class decides and the other half reports.
    Where all images are in one heap, these halves are of those that training leaves out.

    Args:
        val: The images for validation.
        test: The images for testing.
        seed: Of the halves; None takes every second image of each class.

    Raises:
        InputError: There are too few images for two halves.
    """
    if not val.held_out and not _same(val, test):
        return HeldOut(val, test, f"{len(val):,} validation images decide, {len(test):,} test images report")
    heap = val.held_out and _same(val, test.subset(every(test.labels, LEFT_OUT)))
    decide, report = halves(val if heap else test, seed)
    source = "images left out of training (which the network may know)" if heap else "test images"
    said = f"{len(decide):,} {source}, half of each class, decide; the other {len(report):,} report"
    return HeldOut(decide, report, said)


def halves(images: ImageSet, seed: int | None = None) -> tuple[ImageSet, ImageSet]:
    """Return two halves with the same share of each class: every second image, or drawn by `seed`.

    Raises:
        InputError: No class has two images.
    """
    mixed = images if seed is None else images.sample(len(images), seed=seed)
    first = every(mixed.labels, _EVEN)
    rest = torch.ones(len(mixed), dtype=torch.bool)
    rest[first] = False
    if not rest.any():
        raise InputError(
            f"{images.name} ({images.split}) has no two images of a class, so none could decide and another report"
        )
    return mixed.subset(first), mixed.subset(rest.nonzero().flatten())


def _same(one: ImageSet, other: ImageSet) -> bool:
    """Return whether two sets are the same images, by their labels and a few looks."""
    if not torch.equal(one.labels, other.labels):
        return False
    places = torch.linspace(0, len(one) - 1, min(_LOOKED_AT, len(one))).long()
    return torch.equal(torch.as_tensor(one.images[places]), torch.as_tensor(other.images[places]))
