"""Goals of a search: how much accuracy may go, and how sure that has to be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from prunekit.errors import InputError
from prunekit.evaluation.paired import check_confidence

_DROP = re.compile(r"\s*([0-9.]+)\s*(%?)\s*")


@dataclass(frozen=True)
class DropGoal:
    """At most `drop` of the accuracy is lost, 0 to 1, and with `confidence` that holds on further images too.

    Examples:
        >>> import prunekit as pk
        >>> pk.DropGoal.parse("1%")
        DropGoal(drop=0.01, confidence=0.95)
    """

    drop: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.drop < 1:
            raise InputError(
                f"a drop of accuracy lies between 0 and 100%, both excluded; found {self.drop:.4g}",
                hint="for example 1%: at most one point lost",
            )
        check_confidence(self.confidence)

    @classmethod
    def parse(cls, text: str | float, confidence: float = 0.95) -> DropGoal:
        """Read `1%`, or 0.01 for the same.

        Raises:
            InputError: It is neither, or out of range.
        """
        match = _DROP.fullmatch(str(text))
        try:
            number = float(match[1])  # type: ignore[index]
        except (TypeError, ValueError):
            raise InputError(f"--max-drop takes points of accuracy such as 1% or 0.5%; found '{text}'") from None
        assert match is not None
        if match[2]:
            number /= 100
        elif number >= 0.5:
            raise InputError(f"--max-drop {text} would be {number:.0%}", hint=f"did you mean --max-drop {number:g}%?")
        return cls(number, confidence)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"max_drop": self.drop, "confidence": self.confidence}
