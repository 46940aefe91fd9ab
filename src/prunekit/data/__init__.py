"""Labelled images: the bundled digits, folders and torchvision's data sets, held in memory where they fit."""

from __future__ import annotations

from prunekit.data.augment import AUGMENTATIONS, Augmentation, augmentation
from prunekit.data.examples import Examples
from prunekit.data.images import ImageSet, check_classes, check_input, labelled_for
from prunekit.data.lazy import LazyImages
from prunekit.data.named import is_named, names
from prunekit.data.randomness import seeded
from prunekit.data.source import open_data

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Examples",
    "ImageSet",
    "LazyImages",
    "augmentation",
    "check_classes",
    "check_input",
    "is_named",
    "labelled_for",
    "names",
    "open_data",
    "seeded",
]
