"""The vocabulary of fitting: trials of candidates, and a finished search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prunekit.api import Pruned
from prunekit.evaluation.paired import Drop, ScoreDrop, drop_from_json
from prunekit.evaluation.score import EvalResult
from prunekit.surgery import Cost
from prunekit.workflows.goals import DropGoal


@dataclass(frozen=True)
class Trial:
    """One candidate: how it was made, what it has left, and what it has lost.

    Attributes:
        way: The method with its settings, as on the command line.
        share: The share of the MACs that was asked for.
        cost: What the candidate costs; None where there is none.
        drop: What it has lost on the images that decide.
        bound: What its drop on further images is at most, with the confidence of the goal.
        met: Whether that is within the goal.
        seconds: The time that making and scoring it took.
        epochs: The epochs of tuning after pruning; 0 for none.
        error: Why there is no such network.

    Examples:
        >>> import prunekit as pk
        >>> trial = pk.Trial("merge", 0.5, None, None, None, False, 0.1, error="nothing can be pruned")
        >>> pk.Trial.from_json(trial.to_json()) == trial
        True
    """

    way: str
    share: float
    cost: Cost | None
    drop: Drop | ScoreDrop | None
    bound: float | None
    met: bool
    seconds: float
    epochs: int = 0
    error: str | None = None

    @property
    def key(self) -> tuple[str, float, int]:
        """Way, share and epochs, which identify a trial of a search."""
        return self.way, self.share, self.epochs

    @property
    def label(self) -> str:
        """The trial in a few words: `merge to 62 % of the MACs, tuned for 3 epochs`."""
        epochs = f", tuned for {self.epochs} epoch{'s' if self.epochs > 1 else ''}" if self.epochs else ""
        return f"{self.way} to {100 * self.share:.3g} % of the MACs{epochs}"

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `from_json` reads it back."""
        cost = self.cost.to_json() if self.cost else None
        return {**vars(self), "cost": cost, "drop": self.drop.to_json() if self.drop else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trial:
        """Read the JSON that `to_json` wrote; raise `TypeError` or `KeyError` for anything else."""
        drop = data["drop"] and drop_from_json(data["drop"])
        found = cls(**{**data, "cost": data["cost"] and Cost(**data["cost"]), "drop": drop})
        numbers = (found.share, found.seconds, found.epochs, 0 if found.bound is None else found.bound)
        if not isinstance(found.way, str) or not all(isinstance(number, int | float) for number in numbers):
            raise TypeError("a trial has a way and numbers")
        if found.met and (found.cost is None or drop is None):
            raise TypeError("a trial that meets a goal has a network")
        return found


def smallest(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the fewest MACs that meets the goal; None where none does."""
    met = [trial for trial in trials if trial.met and trial.cost is not None]
    return min(met, key=lambda trial: trial.cost.macs if trial.cost else 0, default=None)


def frontier(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials that no other one beats in both MACs and drop, from few MACs to many."""
    scored = [trial for trial in trials if trial.cost is not None and trial.drop is not None]
    scored.sort(key=lambda trial: (trial.cost.macs if trial.cost else 0, trial.drop.share if trial.drop else 0.0))
    best: list[Trial] = []
    for trial in scored:
        if not best or (trial.drop and best[-1].drop and trial.drop.share < best[-1].drop.share):
            best.append(trial)
    return tuple(best)


@dataclass(frozen=True)
class Fitted:
    """A finished search: the smallest network that meets the goal, and everything that was tried.

    Attributes:
        model: The network. The one that was given is as it was.
        goal: What it meets.
        trial: The trial that made it.
        history: All trials, in order.
        before: The cost of the original.
        original: Its figures on the held-out images.
        pruned: The surgery, whose `plan` does it again; None where the network was made by an earlier search.

    Examples:
        >>> import prunekit as pk
        >>> model, held_out = pk.load("prunekit:vgg_digits").eval(), pk.open_data("digits", "test")
        >>> found = pk.fit(model, held_out, pk.DropGoal(0.1, 0.9), ways=[pk.Variant("merge")])
        >>> found.trial in found.history, found.trial.met, found.trial.cost.macs < found.before.macs
        (True, True, True)
    """

    model: nn.Module
    goal: DropGoal
    trial: Trial
    history: tuple[Trial, ...]
    before: Cost
    original: EvalResult = field(repr=False)
    pruned: Pruned | None = field(repr=False, default=None)
