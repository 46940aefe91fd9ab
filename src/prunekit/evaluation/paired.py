"""Drop of a score between two networks on the same images, and how sure that is.

Of accuracy, both answer the same questions, so only images count on which one is right and the other wrong. The
interval is the score interval of Tango, "Equivalence test and confidence interval for the difference in proportions for
the paired-sample design" (Statistics in Medicine 17, 1998): it keeps its level where few images or none are discordant.
Without torch: the command line checks a confidence before it loads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from prunekit.errors import InputError


@dataclass(frozen=True)
class Drop:
    """Right answers that a network has lost and gained on `images`, against an original.

    Examples:
        >>> import prunekit as pk
        >>> drop = pk.Drop(images=2000, lost=40, gained=20)
        >>> drop.share, round(drop.at_most(0.95), 4)
        (0.01, 0.0167)
    """

    images: int
    lost: int
    gained: int

    @property
    def share(self) -> float:
        """The drop of accuracy on these images, -1 to 1."""
        return (self.lost - self.gained) / self.images

    def at_most(self, confidence: float) -> float:
        """Return what the drop on further images exceeds with probability `1 - confidence` at most, -1 to 1.

        Args:
            confidence: Of the one-sided bound, 0.5 to 1, both excluded.

        Raises:
            InputError: The confidence is out of range.
        """
        quantile = NormalDist().inv_cdf(check_confidence(confidence))
        low, high = self.share, 1.0
        for _ in range(50):  # the score falls as the assumed drop rises
            middle = (low + high) / 2
            low, high = (middle, high) if self._score(middle) > -quantile else (low, middle)
        return high

    def _score(self, drop: float) -> float:
        """Return the score statistic of the assumed `drop` (Tango 1998, equations 3 to 5)."""
        a = 2 * self.images
        b = -self.lost - self.gained + (a - self.lost + self.gained) * drop
        c = -self.gained * drop * (1 - drop)
        gained = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # most likely share, if that were the drop
        variance = self.images * (2 * gained + drop * (1 - drop))
        difference = self.lost - self.gained - self.images * drop
        return difference / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, difference)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**vars(self), "share": self.share}


@dataclass(frozen=True)
class ScoreDrop:
    """What a network has lost of a score on `images`, against an original: where an answer is not just right or wrong.

    Both were scored on the same `parts` of the images; how the loss differs between these tells how sure it is.

    Attributes:
        images: How many examples there are.
        parts: Into how many parts they were divided.
        share: What is lost on all of them: of a score in percent as it is (0.01: one point), of any other as a share of
            the original's score.
        error: The standard error of that, from the parts.

    Examples:
        >>> from prunekit.evaluation.paired import ScoreDrop
        >>> drop = ScoreDrop(images=200, parts=20, share=0.01, error=0.002)
        >>> round(drop.at_most(0.95), 4)
        0.0135
    """

    images: int
    parts: int
    share: float
    error: float

    def at_most(self, confidence: float) -> float:
        """Return what the loss on further examples exceeds with probability `1 - confidence` at most.

        By Student's distribution over the parts.

        Args:
            confidence: Of the one-sided bound, 0.5 to 1, both excluded.

        Raises:
            InputError: The confidence is out of range.
        """
        return self.share + self.error * _student(check_confidence(confidence), self.parts - 1)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dict(vars(self))


def drop_from_json(data: Mapping[str, Any]) -> Drop | ScoreDrop:
    """Read the JSON of a drop; raise `TypeError` or `KeyError` for anything else."""
    if "parts" in data:
        return ScoreDrop(int(data["images"]), int(data["parts"]), float(data["share"]), float(data["error"]))
    return Drop(*(int(data[key]) for key in ("images", "lost", "gained")))


def _student(confidence: float, freedom: int) -> float:
    """Return the quantile of Student's distribution (Abramowitz and Stegun, 26.7.5)."""
    z: float = NormalDist().inv_cdf(confidence)
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + math.fsum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def images_needed(drop: float, confidence: float) -> int:
    """Return how many images show a drop of at most `drop`, 0 to 1, in the best case: no image is answered otherwise.

    Raises:
        InputError: The confidence is out of range.
    """
    quantile = NormalDist().inv_cdf(check_confidence(confidence))
    return math.ceil(quantile**2 * (1 - drop) / drop)


def check_confidence(confidence: float) -> float:
    """Return a confidence between 0.5 and 1, both excluded.

    Raises:
        InputError: It is not.
    """
    if not 0.5 < confidence < 1:
        raise InputError(
            f"a confidence lies between 0.5 and 1, both excluded; found {confidence}", hint="usual is 0.95"
        )
    return confidence
