"""What to tune in the time that is left, and for how long: planned by measured speed, with a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prunekit.workflows.fitting.sizes import CLOSE, where
from prunekit.workflows.fitting.trials import Trial, smallest
from prunekit.workflows.goals import DropGoal

MARGIN = 0.85
"""The share of the time left that a plan fills: epochs differ in length, and a machine has other work."""

_MOST = 30  # epochs: more change little
_ENOUGH = 5  # epochs for which half of the time is left to another try
_REGAINED = 3.0  # restoration may lose this many times the goal where tuning follows
_SHRINK = 0.8  # of the size is the next try where tuning has met the goal
_FIRST_SHRINK = 0.65  # of the smallest size without tuning is the first try at least
_LEAST = 0.05  # share of the MACs


@dataclass(frozen=True)
class Pace:
    """Measured seconds: of an `epoch` of tuning, and of the `rest` of such a trial, pruning and scoring."""

    epoch: float
    rest: float

    def after(self, seconds: float, epochs: int) -> Pace:
        """Return the pace by a trial that took `seconds` for so many epochs; what is not its `rest` was the epochs."""
        return Pace(max(self.epoch / 2, (seconds - self.rest) / epochs), self.rest)


@dataclass(frozen=True)
class Tuning:
    """A trial to make: prune to `share` of the MACs, and tune for so many `epochs`."""

    share: float
    epochs: int

    def seconds(self, pace: Pace) -> float:
        """Return how long that takes."""
        return pace.rest + self.epochs * pace.epoch


def next_tuning(trials: Sequence[Trial], goal: DropGoal, left: float, pace: Pace) -> Tuning | None:
    """Return what to tune next; None where the time does not allow an epoch, or nothing smaller is to be found.

    Half of the time goes into each try as long as that is enough, so that another one can profit from it.

    Args:
        trials: All trials of one way so far, at least one of which was scored.
        goal: How much accuracy may go.
        left: The seconds that are left.
        pace: How long things take.
    """
    share = _share(trials, goal)
    if share is None:
        return None
    whole = _epochs(MARGIN * left, pace)
    half = _epochs(MARGIN * left / 2, pace)
    epochs = half if half >= _ENOUGH else whole
    return Tuning(round(share, 3), min(_MOST, epochs)) if epochs >= 1 else None


def _epochs(seconds: float, pace: Pace) -> int:
    return math.floor((seconds - pace.rest) / pace.epoch)


def _share(trials: Sequence[Trial], goal: DropGoal) -> float | None:
    """Return the share of the MACs: between what is met and what tuning could not save, or where it just might."""
    best = smallest(trials)
    top = best.share if best else 1.0
    failed = [trial.share for trial in trials if trial.share < top and not trial.met and (trial.epochs or trial.error)]
    if failed:
        low = max(failed)
        return (low + top) / 2 if top - low > CLOSE else None
    if any(trial.epochs and trial.met for trial in trials):
        share = _SHRINK * top
    else:
        share = min(max(_hopeful(trials, goal), _FIRST_SHRINK * top), top - CLOSE)
    return share if share >= _LEAST else None


def _hopeful(trials: Sequence[Trial], goal: DropGoal) -> float:
    """Return the share at which restoration alone would lose a few times the goal, by the two smallest sizes."""
    scored = sorted((one for one in trials if one.bound is not None and not one.epochs), key=lambda one: one.share)
    if not scored:
        return 0.0
    return where(scored[0], scored[1] if len(scored) > 1 else None, _REGAINED * goal.drop)
