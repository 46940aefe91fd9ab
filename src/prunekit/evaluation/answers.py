"""The predicted class of each image in a data set: accuracy by class, and confusions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import InputError
from prunekit.evaluation.paired import Drop

_UNBALANCED = 0.3  # margin of a constant prediction over even shares: 65 % of two classes, 37 % of ten


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class; shares are from 0 to 1.

    `accuracy` is the share of its `images` that are predicted as such (its recall; None without images), `precision`
    the share of its predictions that are right (None where there are none).
    """

    name: str
    images: int
    accuracy: float | None
    precision: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"class": self.name, "images": self.images, "accuracy": self.accuracy, "precision": self.precision}


@dataclass(frozen=True, eq=False)
class Answers:
    """The true and the predicted class of each image, both `(N,)`, as indices into `classes`."""

    classes: tuple[str, ...]
    labels: Tensor = field(repr=False)
    named: Tensor = field(repr=False)

    @cached_property
    def per_class(self) -> tuple[ClassScore, ...]:
        """Return the scores of every class, in the order of the data set."""
        count = len(self.classes)
        right = torch.bincount(self.labels[self.labels == self.named], minlength=count).tolist()
        images = torch.bincount(self.labels, minlength=count).tolist()
        named = torch.bincount(self.named, minlength=count).tolist()
        return tuple(
            ClassScore(name, of, hits / of if of else None, hits / so if so else None)
            for name, hits, of, so in zip(self.classes, right, images, named, strict=True)
        )

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the classes' accuracies (macro recall), over those that have images."""
        known = [score.accuracy for score in self.per_class if score.accuracy is not None]
        return sum(known) / len(known)

    @property
    def largest(self) -> tuple[str, float]:
        """The largest class and its share of all images: the accuracy of predicting it always."""
        score = max(self.per_class, key=lambda score: score.images)
        return score.name, score.images / len(self.labels)

    @property
    def unbalanced(self) -> bool:
        """True where accuracy says little, since always predicting the largest class would be right on many images."""
        seen = sum(score.images > 0 for score in self.per_class)
        if seen < 2:
            return len(self.classes) > 1
        even = 1 / seen
        return (self.largest[1] - even) / (1 - even) >= _UNBALANCED

    def mistakes(self) -> Mapping[tuple[int, int], int]:
        """Return how often the first class was mistaken for the second, most frequent first."""
        wrong = self.labels != self.named
        pairs = self.labels[wrong] * len(self.classes) + self.named[wrong]
        found, counts = torch.unique(pairs, return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        return {
            divmod(int(pair), len(self.classes)): int(count)
            for pair, count in zip(found[order].tolist(), counts[order].tolist(), strict=True)
        }

    def confusion(self) -> Tensor:
        """Return the confusion matrix, true classes (rows) by predicted ones (columns): `(classes, classes)` counts."""
        count = len(self.classes)
        return torch.bincount(self.labels * count + self.named, minlength=count * count).view(count, count)


def drop_between(before: Answers, after: Answers) -> Drop:
    """Return the drop from one network's answers to another's.

    Raises:
        InputError: They answer different images.
    """
    if not torch.equal(before.labels, after.labels):
        raise InputError("two networks can be compared on the same images alone, and these differ")
    right, still = before.named == before.labels, after.named == after.labels
    return Drop(len(right), int((right & ~still).sum()), int((~right & still).sum()))
