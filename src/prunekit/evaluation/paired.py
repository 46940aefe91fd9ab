"""Drop of accuracy between two networks on the same images, and how sure that is.

Both answer the same questions, so only images count on which one is right and the other wrong. The interval is the
score interval of Tango, "Equivalence test and confidence interval for the difference in proportions for the
paired-sample design" (Statistics in Medicine 17, 1998): it keeps its level where few images or none are discordant.
Without torch: the command line checks a confidence before it loads.
"""

from __future__ import annotations

import math
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
