"""The score that counts of a task: its name, its unit, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """What a network is measured by.

    Attributes:
        name: What it is called, such as `accuracy` or `mean IoU`.
        unit: `%` for a share from 0 to 1, which people see in percent; any other stands behind the number.
        higher_is_better: Whether more is better.

    Examples:
        >>> import prunekit as pk
        >>> error = pk.Metric("error", "px", higher_is_better=False)
        >>> error.beats(1.5, 2.0), error.lost(1.5, 2.0)
        (True, 0.5)
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True

    @property
    def is_share(self) -> bool:
        """True where it lies between 0 and 1."""
        return self.unit == "%"

    @property
    def title(self) -> str:
        """The name as the beginning of a title."""
        return self.name[:1].upper() + self.name[1:]

    def goodness(self, value: float) -> float:
        """Return a number that is larger the better `value` is."""
        return value if self.higher_is_better else -value

    def beats(self, value: float, other: float) -> bool:
        """Return whether `value` is better than `other`."""
        return self.goodness(value) > self.goodness(other)

    def lost(self, before: float, after: float) -> float:
        """Return by how much `after` is worse than `before`; negative where it is better."""
        return self.goodness(before) - self.goodness(after)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Metric:
        """Read the JSON that `to_json` wrote; raise `TypeError` for anything else."""
        found = cls(**data)
        if not (isinstance(found.name, str) and isinstance(found.unit, str)):
            raise TypeError("a metric has a name and a unit")
        return found


ACCURACY = Metric("accuracy", "%")
"""The share of right answers, of classification."""
