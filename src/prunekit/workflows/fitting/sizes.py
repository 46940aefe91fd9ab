"""The size to try next: losses grow about as a power of the share that is removed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prunekit.workflows.fitting.trials import Trial
from prunekit.workflows.goals import DropGoal

FIRST = 0.7
"""The share of the MACs at which the ways are compared."""

CLOSE = 0.02
"""The share of the MACs within which the smallest size is found."""

_LARGEST, _SMALLEST = 0.97, 0.05
_POWER = 2.0  # of the loss in the share removed, while one size alone is known; ResNets lie between 1.5 and 2.5
_WITHIN = 0.2  # of what is left between two known sizes, the next one keeps away from both
_STEP = 2.0  # what is removed, or left, changes by this factor at most


def next_share(trials: Sequence[Trial], goal: DropGoal) -> float | None:
    """Return the share of the MACs to try next, given the trials of one way; None once the smallest is found.

    A size that is refused bounds the search from below, like one that loses too much.
    """
    if not trials:
        return FIRST
    met = [trial for trial in trials if trial.met]
    if not met:
        return _larger(trials, goal)
    high = min(met, key=lambda trial: trial.share)
    below = [trial for trial in trials if not trial.met and trial.share < high.share]
    low = max(below, key=lambda trial: trial.share, default=None)
    if low is None:
        share = max(high.share / _STEP, min(where(high, None, goal.drop), high.share - _step(met)))
        return share if share >= _SMALLEST else None
    width = high.share - low.share
    if width <= CLOSE:
        return None
    wanted = (low.share + high.share) / 2 if low.bound is None else where(high, low, goal.drop)
    return min(high.share - _WITHIN * width, max(low.share + _WITHIN * width, wanted))


def _larger(trials: Sequence[Trial], goal: DropGoal) -> float | None:
    """Return a larger share than all that have lost too much; None close to the whole network."""
    highest = max(trials, key=lambda trial: trial.share)
    likely = (1 + highest.share) / 2 if highest.bound is None else where(highest, None, goal.drop) + CLOSE / 2
    share = min(1 - (1 - highest.share) / _STEP, max(likely, highest.share + _step(trials)))
    if share <= _LARGEST:
        return share
    return _LARGEST if highest.share < _LARGEST - CLOSE else None


def _step(trials: Sequence[Trial]) -> float:
    """Return how far the next size is away at least: twice as far as the last one, so that few lead anywhere."""
    last = [trial.share for trial in trials[-2:]]
    return 2 * abs(last[0] - last[1]) if len(last) > 1 else CLOSE


def where(one: Trial, other: Trial | None, drop: float) -> float:
    """Return the share at which a power law through the bounds of one or two trials comes to `drop`."""
    (gone, loss), power = _logs(one, drop), _POWER
    if other is not None:
        gone_too, loss_too = _logs(other, drop)
        power = max(0.1, (loss_too - loss) / (gone_too - gone)) if gone_too != gone else _POWER
    return 1 - math.exp(min(0.0, gone + (math.log(drop) - loss) / power))


def _logs(trial: Trial, drop: float) -> tuple[float, float]:
    """Return the logarithms of the share removed and of the bound; gains count as next to nothing."""
    return math.log(max(1e-6, 1 - trial.share)), math.log(max(trial.bound or 0.0, drop / 10))
