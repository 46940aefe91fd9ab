"""Held-out examples: those that decide and those that report, split off once and used for nothing else.

A network knows by heart what it was trained on and loses less there than elsewhere, so neither are training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from prunekit.data import Examples, ImageSet
from prunekit.data.splits import LEFT_OUT, every
from prunekit.errors import InputError

_EVEN = frozenset({0, 2, 4, 6, 8})
_LOOKED_AT = 8  # images by which two sets are told apart
_Set = TypeVar("_Set", bound=Examples)
_Set_co = TypeVar("_Set_co", bound=Examples, covariant=True)


@dataclass(frozen=True)
class HeldOut(Generic[_Set_co]):
    """Images that decide whether a candidate meets a goal, and others that tell what the chosen one has lost.

    `said` tells people in one line which these are.
    """

    decide: _Set_co
    report: _Set_co
    said: str


def hold_out(val: _Set, test: _Set, seed: int | None = None) -> HeldOut[_Set]:
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
    noun = f"{val.noun}s"
    if not val.held_out and not _same(val, test):
        return HeldOut(val, test, f"{len(val):,} validation {noun} decide, {len(test):,} test {noun} report")
    labelled = isinstance(test, ImageSet)
    heap = isinstance(test, ImageSet) and val.held_out and _same(val, test.subset(every(test.labels, LEFT_OUT)))
    decide, report = halves(val if heap else test, seed)
    source = f"{noun} left out of training (which the network may know)" if heap else f"test {noun}"
    share = "half of each class" if labelled else "every other one"
    return HeldOut(decide, report, f"{len(decide):,} {source}, {share}, decide; the other {len(report):,} report")


def halves(images: _Set, seed: int | None = None) -> tuple[_Set, _Set]:
    """Return two halves, of labelled images with the same share of each class: every second one, or drawn by `seed`.

    Raises:
        InputError: No class has two images.
    """
    mixed = images if seed is None else images.sample(len(images), seed=seed)
    first = every(mixed.labels, _EVEN) if isinstance(mixed, ImageSet) else torch.arange(0, len(mixed), 2)
    rest = torch.ones(len(mixed), dtype=torch.bool)
    rest[first] = False
    if not rest.any():
        raise InputError(
            f"{images.name} ({images.split}) has no two {images.noun}s of a class, so none could decide and another "
            "report"
        )
    return mixed.subset(first), mixed.subset(rest.nonzero().flatten())


def _same(one: Examples, other: Examples) -> bool:
    """Return whether two sets are the same images, by their labels and a few looks."""
    if not isinstance(one, ImageSet) or not isinstance(other, ImageSet):
        return one.identity() == other.identity()
    if not torch.equal(one.labels, other.labels):
        return False
    places = torch.linspace(0, len(one) - 1, min(_LOOKED_AT, len(one))).long()
    return torch.equal(torch.as_tensor(one.images[places]), torch.as_tensor(other.images[places]))
