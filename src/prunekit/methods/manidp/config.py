"""The settings of ManiDP. Stands below what needs torch, so that a command can show its flags without importing it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from prunekit.errors import InputError, unknown_name
from prunekit.methods.base import option

RUNTIMES = ("masked", "gather", "buckets", "auto")
SUMMARY = "ManiDP (Tang et al., CVPR 2021): gates that follow each input; see prunekit manidp train."
STARTS = ("identity", "informed")
_RENEWALS = 32  # of the thresholds in a run, at least


@dataclass(frozen=True)
class GateRecipe:
    """Recipe for making and training gates; defaults are the paper's, with the release's weights of the two losses."""

    keep: float = option(0.6, help="Share of each layer's channels to keep at the end (the paper's target rate).")
    complexity: float = option(5e-3, help="Weight of the complexity loss (lambda').")
    similarity: float = option(1.0, help="Weight of the similarity loss (gamma).")
    no_complexity: bool = option(False, help="Leave the complexity loss out.")
    no_similarity: bool = option(False, help="Leave the similarity loss out.")
    tau: float = option(1.0, help="Images with less than tau times the mean loss count as easy.")
    ramp: float = option(1.0, help="Share of the run in which the kept share falls from 1 to --keep.")
    renew: int | None = option(
        None, help="Times an epoch that the thresholds are set anew (default: once, and in short runs 32 times in all)."
    )
    start: str = option(
        "identity",
        choices=STARTS,
        help="identity: as the network was. informed: gates closed by what moves its answers least, layers refitted.",
    )
    ease: float = option(3.0, help="informed start: how much fewer channels easy images keep (0: all keep the same).")
    gate_rate: float = option(1.0, help="Learning rate of the gates, as a share of the network's.")
    calibrate: bool = option(
        True, help="At the end, set the thresholds so that training images keep the share --keep of the channels."
    )
    squeeze: int | None = option(
        None, help="Width of the gates' hidden layer (default: the layer's channels, half of them from 80 on)."
    )

    def __post_init__(self) -> None:
        for name, low, high in (("keep", 0, 1), ("ramp", 0, 1), ("tau", 0, math.inf)):
            value = getattr(self, name)
            if not low < value <= high:
                span = f"above {low} and at most {high}" if high < math.inf else f"above {low}"
                raise InputError(f"--{name} must be {span}, not {value:g}")
        for name in ("complexity", "similarity", "ease", "gate_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(self, name):g}")
        if self.start not in STARTS:
            raise unknown_name("start", self.start, STARTS)
        for name in ("renew", "squeeze"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(self, name)}")

    @property
    def losses(self) -> tuple[float, float]:
        """The weights of complexity and similarity as they are used: 0 for what is left out."""
        return 0.0 if self.no_complexity else self.complexity, 0.0 if self.no_similarity else self.similarity

    def renewals(self, epochs: int) -> int:
        """Return how often an epoch of so many the thresholds are set anew.

        Once, as in the paper, is for long runs: two thresholds in two epochs would close nearly half of the channels
        at once, and nothing learns to do without them.
        """
        return self.renew or max(1, math.ceil(_RENEWALS / epochs))

    def hidden(self, channels: int) -> int:
        """Return the width of the hidden layer of a gate on `channels` channels."""
        return self.squeeze or (channels if channels < 80 else channels // 2)

    def keep_rate(self, done: float, epochs: int) -> float:
        """Return the share of channels to keep once `done` epochs are over: a cosine from 1 down to `keep`.

        `r = (1 - r_T) / 2 cos(pi done / E) + (1 + r_T) / 2`, with `E` the epochs of the ramp. An informed start is
        there already.
        """
        if self.start == "informed":
            return self.keep
        share = min(1.0, done / (self.ramp * epochs))
        return (1 - self.keep) / 2 * math.cos(math.pi * share) + (1 + self.keep) / 2

    def to_json(self) -> dict[str, Any]:
        """Return the settings as they are stored."""
        return asdict(self)
