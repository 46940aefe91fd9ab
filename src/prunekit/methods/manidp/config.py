"""The settings of ManiDP. Stands below what needs torch, so that a command can show its flags without importing it."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from prunekit.errors import InputError, unknown_name
from prunekit.methods.base import option

RUNTIMES = ("masked", "gather", "buckets", "auto")
SUMMARY = "ManiDP (Tang et al., CVPR 2021): gates that follow each input; see prunekit manidp train."
STARTS = ("identity", "informed")
RATE = 0.05  # of learning, in the paper
_RENEWALS = 32  # of the thresholds in a run, at least


@dataclass(frozen=True)
class GateRecipe:
    """Recipe for making and training gates; defaults are the paper's, with the release's weights of the two losses."""

    keep: float = option(0.6, help="Share of each layer's channels to keep at the end (the paper's target rate).")
    budgets: str | None = option(
        None,
        help="Train for every budget in this range of the MACs, such as 35%-80%, in place of --keep: each step has a "
        "budget of its own, and the dense network teaches.",
    )
    complexity: float = option(5e-3, help="Weight of the complexity loss (lambda').")
    similarity: float = option(1.0, help="Weight of the similarity loss (gamma).")
    no_complexity: bool = option(False, help="Leave the complexity loss out.")
    no_similarity: bool = option(False, help="Leave the similarity loss out.")
    tau: float = option(1.0, help="Images with less than tau times the mean loss count as easy.")
    ramp: float = option(1.0, help="Share of the run in which the kept share falls from 1 to --keep.")
    renew: int | None = option(
        None, help="Times an epoch that the thresholds are set anew (default: once, and in short runs 32 times in all)."
    )
    start: str | None = option(
        None,
        choices=STARTS,
        help="identity: as the network was. informed: gates closed by what moves its answers least, layers refitted "
        "(default: identity, as in the paper; informed with --budgets).",
    )
    ease: float = option(3.0, help="informed start: how much fewer channels easy images keep (0: all keep the same).")
    gate_rate: float | None = option(
        None, help="Learning rate of the gates, as a share of the network's (default: 1; 0.01 with --budgets)."
    )
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
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be at least 0, not {value:g}")
        if self.start is not None and self.start not in STARTS:
            raise unknown_name("start", self.start, STARTS)
        if self.budgets is not None:
            _read_span(self.budgets)
        for name in ("renew", "squeeze"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(self, name)}")

    @property
    def span(self) -> tuple[float, float] | None:
        """The least and the largest budget to train for, as shares of the dense MACs; None for one share `keep`."""
        return None if self.budgets is None else _read_span(self.budgets)

    @property
    def informed(self) -> bool:
        """Whether the gates start informed, with the default filled in."""
        return self.start == "informed" or (self.start is None and self.budgets is not None)

    @property
    def rate_of_gates(self) -> float:
        """The learning rate of the gates as a share of the network's, with the default filled in.

        Gates that learn as fast as the network reorder their channels every few steps, which undoes an informed start.
        """
        if self.gate_rate is not None:
            return self.gate_rate
        return 1.0 if self.budgets is None else 0.01

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
        return 1 - (1 - self.keep) * self.closed(done, epochs)

    def closed(self, done: float, epochs: int) -> float:
        """Return which part of what is to be closed in the end, 0 to 1, is closed once `done` epochs are over."""
        if self.informed:
            return 1.0
        share = min(1.0, done / (self.ramp * epochs))
        return (1 - math.cos(math.pi * share)) / 2

    def to_json(self) -> dict[str, Any]:
        """Return the settings as they are stored, with the defaults filled in."""
        filled = {"start": "informed" if self.informed else "identity", "gate_rate": self.rate_of_gates}
        return {**asdict(self), **filled}


def _read_span(text: str) -> tuple[float, float]:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%?\s*-\s*(\d+(?:\.\d*)?)\s*%\s*", text)
    low, high = (float(part) / 100 for part in found.groups()) if found else (0.0, 0.0)
    if not 0 < low < high <= 1:
        raise InputError(f"--budgets must be a range of the MACs such as 35%-80%, not '{text}'")
    return low, high
