"""The smallest network that meets a goal: candidates are pruned and restored, and compared with the original.

Several ways are tried at one size; the one that loses least is then taken to the smallest size that the goal allows, by
bisection. The held-out images decide and serve nothing else: no candidate is restored or tuned with them. Whether one
meets the goal is told by the paired bound of `prunekit.evaluation.paired`, so that luck on few images is no success.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunekit import api
from prunekit.data import ImageSet
from prunekit.errors import InputError, PrunekitError
from prunekit.evaluation.paired import Drop, drop_between, images_needed
from prunekit.evaluation.score import Score, accuracy
from prunekit.plan import Plan
from prunekit.restoration.images import Images
from prunekit.surgery import Cost
from prunekit.workflows.goals import DropGoal
from prunekit.workflows.sweeps import Variant

FIRST = 0.7  # share of the MACs at which the ways are compared
_CLOSE = 0.02  # share of the MACs within which the smallest size is found
_LARGEST, _SMALLEST = 0.97, 0.05
WAYS = (Variant("merge"), Variant("slim"))


@dataclass(frozen=True)
class Trial:
    """One candidate: the way it was made, the share of the MACs asked for, what it has left, and what it has lost.

    `bound` is what its drop on further images is at most, with the confidence of the goal, and `met` whether that is
    within it; `error` tells why there is no such network.

    Examples:
        >>> import prunekit as pk
        >>> trial = pk.Trial("merge", 0.5, None, None, None, False, 0.1, "no batch norm")
        >>> pk.Trial.from_json(trial.to_json()) == trial
        True
    """

    way: str
    share: float
    cost: Cost | None
    drop: Drop | None
    bound: float | None
    met: bool
    seconds: float
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `from_json` reads it back."""
        cost = self.cost.to_json() if self.cost else None
        return {**vars(self), "cost": cost, "drop": self.drop.to_json() if self.drop else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trial:
        """Read the JSON that `to_json` wrote."""
        drop = data["drop"] and Drop(data["drop"]["images"], data["drop"]["lost"], data["drop"]["gained"])
        return cls(**{**data, "cost": data["cost"] and Cost(**data["cost"]), "drop": drop})


@dataclass(frozen=True)
class Fitted:
    """A finished search: the smallest network that meets the goal, its plan, and everything that was tried.

    Attributes:
        model: The network. The one that was given is as it was.
        plan: What was done; `apply` does it again.
        trial: The trial that made it.
        history: All trials, in order.
        before: The cost of the original.
        original: Its score on the held-out images.
    """

    model: nn.Module
    plan: Plan
    trial: Trial
    history: tuple[Trial, ...]
    before: Cost
    original: Score = field(repr=False)


def fit(
    model: nn.Module,
    held_out: ImageSet,
    goal: DropGoal,
    *,
    images: Images | None = None,
    ways: Sequence[Variant] = WAYS,
    seconds: float | None = None,
    known: Iterable[Trial] = (),
    on_trial: Callable[[Trial, nn.Module | None], None] | None = None,
) -> Fitted:
    """Search the smallest network, by its MACs, that loses no more accuracy than the goal allows.

    Args:
        model: A classifier; it stays as it is.
        held_out: Labelled images to decide by. The network must not have been trained on them: it knows by heart what
            it was trained on, and loses less there than elsewhere.
        goal: How much accuracy may go.
        images: Unlabelled, normalised images `(N, C, H, W)` to restore from, none of them held out.
        ways: Methods with their settings that are tried.
        seconds: When to stop searching, as long as there is something to show.
        known: Trials of an earlier search with the same arguments, which are not repeated.
        on_trial: Called after each new trial, with the network where it is the smallest so far that meets the goal.

    Returns:
        The network and how it was found.

    Raises:
        InputError: Too few held-out images for such a drop, or no candidate meets the goal.
    """
    needed = images_needed(goal.drop, goal.confidence)
    if len(held_out) < needed:
        raise InputError(
            f"a drop of at most {goal.drop:.2%} cannot be shown with confidence {goal.confidence:g} on "
            f"{len(held_out)} images",
            hint=f"at least {needed} held-out images are needed, or a lower confidence",
        )
    search = _Search(model, held_out, goal, images, list(known), on_trial, seconds)
    found = [search.trial(way, FIRST) for way in ways if search.in_time()]
    able = [(trial.bound, number) for number, trial in enumerate(found) if trial.bound is not None]
    if not able:
        raise InputError("no way of pruning fits this network: " + "; ".join(f"{t.way}: {t.error}" for t in found))
    best = ways[min(able)[1]]
    while search.in_time() and (share := next_share(search.trials_of(best), goal)) is not None:
        search.trial(best, share)
    return search.result()


def next_share(trials: Sequence[Trial], goal: DropGoal) -> float | None:
    """Return the share of the MACs to try next, given the trials of one way; None once the smallest is found."""
    scored = [trial for trial in trials if trial.bound is not None]
    refused = max((trial.share for trial in trials if trial.bound is None), default=0.0)
    met = [trial for trial in scored if trial.met]
    if not met:
        highest = max((trial.share for trial in trials), default=FIRST)
        share = (1 + highest) / 2
        return share if share <= _LARGEST else None
    high = min(met, key=lambda trial: trial.share)
    below = [trial for trial in scored if not trial.met and trial.share < high.share]
    low = max(below, key=lambda trial: trial.share, default=None)
    floor = max(refused if refused < high.share else 0.0, low.share if low else 0.0)
    if high.share - floor <= _CLOSE:
        return None
    if low is None or low.share < floor:
        share = max(high.share / 2, (high.share + floor) / 2)
        return share if share >= _SMALLEST else None
    assert low.bound is not None
    assert high.bound is not None
    # where a line through both meets the goal, well inside, since the true curve is steeper below
    part = (goal.drop - high.bound) / max(1e-9, low.bound - high.bound)
    return high.share - (high.share - low.share) * min(0.7, max(0.3, part))


class _Search:
    """Trials so far, and the smallest network among them that meets the goal."""

    def __init__(
        self,
        model: nn.Module,
        held_out: ImageSet,
        goal: DropGoal,
        images: Images | None,
        known: list[Trial],
        on_trial: Callable[[Trial, nn.Module | None], None] | None,
        seconds: float | None,
    ) -> None:
        self._started = time.perf_counter()
        self._model, self._held_out, self._goal, self._images = model, held_out, goal, images
        self._known = {(trial.way, trial.share): trial for trial in known}
        self._on_trial, self._seconds = on_trial, seconds
        self._original = accuracy(model, held_out)
        self._example = torch.zeros(1, *held_out.input_spec.shape)
        self._before: Cost = api.inspect(model, self._example).cost
        self._best: tuple[Trial, api.Pruned] | None = None
        self.trials: list[Trial] = []

    def trials_of(self, way: Variant) -> list[Trial]:
        """Return the trials of one way."""
        return [trial for trial in self.trials if trial.way == way.label]

    def in_time(self) -> bool:
        """Return whether another trial fits into the time, as long as something has been found."""
        if self._seconds is None or self._best is None:
            return True
        longest = max((trial.seconds for trial in self.trials), default=0.0)
        return time.perf_counter() - self._started + longest <= self._seconds

    def trial(self, way: Variant, share: float) -> Trial:
        """Prune to a share of the MACs that way, restore and compare; or recall that from an earlier search."""
        share = round(share, 3)
        trial, pruned = self._known.get((way.label, share)), None
        if trial is None or self._is_better(trial):
            trial, pruned = self._tried(way, share)
        self.trials.append(trial)
        better = pruned is not None and self._is_better(trial)
        if better:
            assert pruned is not None
            self._best = trial, pruned
        if self._on_trial:
            self._on_trial(trial, pruned.model if pruned is not None and better else None)
        return trial

    def _is_better(self, trial: Trial) -> bool:
        if not trial.met or trial.cost is None:
            return False
        return self._best is None or trial.cost.macs < self._best[1].after.macs

    def _tried(self, way: Variant, share: float) -> tuple[Trial, api.Pruned | None]:
        started = time.perf_counter()
        try:
            config = api.make_config(way.method, **{**way.settings, "target_macs": f"{share:.1%}"})
            pruned = api.prune(way.method, self._model, self._example, config, images=self._images)
        except PrunekitError as refused:
            seconds = time.perf_counter() - started
            return Trial(way.label, share, None, None, None, False, seconds, refused.message), None
        drop = drop_between(self._original.answers, accuracy(pruned.model, self._held_out).answers)
        bound, seconds = drop.at_most(self._goal.confidence), time.perf_counter() - started
        met = bound <= self._goal.drop
        return Trial(way.label, share, pruned.after, drop, bound, met, seconds), pruned

    def result(self) -> Fitted:
        """Return what was found.

        Raises:
            InputError: nothing meets the goal.
        """
        if self._best is None:
            raise self._unmet()
        trial, pruned = self._best
        return Fitted(pruned.model, pruned.plan, trial, tuple(self.trials), self._before, self._original)

    def _unmet(self) -> InputError:
        scored = [trial for trial in self.trials if trial.bound is not None]
        nearest = min(scored, key=lambda trial: trial.bound or 0.0)
        assert nearest.drop is not None
        assert nearest.bound is not None
        return InputError(
            f"no network was found that loses at most {self._goal.drop:.2%}: the nearest, {nearest.way} to "
            f"{nearest.share:.0%} of the MACs, loses {nearest.drop.share:.2%} of {nearest.drop.images} held-out "
            f"images, which shows no more than at most {nearest.bound:.2%}",
            hint=f"allow --max-drop {100 * nearest.bound:.2g}%, name more held-out images, or give time for tuning",
        )
