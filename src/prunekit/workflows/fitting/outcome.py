"""What a finished search comes to on the images that did not decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.evaluation.answers import drop_between
from prunekit.evaluation.paired import Drop
from prunekit.evaluation.score import EvalResult, evaluate
from prunekit.workflows.fitting.holding_out import HeldOut
from prunekit.workflows.fitting.trials import Fitted


@dataclass(frozen=True)
class Outcome:
    """A finished search with its figures on images that report.

    Attributes:
        fitted: The search.
        model: What the network is called.
        data: The images, as named.
        held_out: Those that decided, and those that report.
        before: The figures of the original on the latter.
        after: Those of the chosen network.
        drop: What it has lost there.
    """

    fitted: Fitted
    model: str
    data: str
    held_out: HeldOut
    before: EvalResult
    after: EvalResult
    drop: Drop

    @property
    def bound(self) -> float:
        """What the drop is at most, with the confidence of the goal."""
        return self.drop.at_most(self.fitted.goal.confidence)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        fitted = self.fitted
        return {
            "model": self.model,
            "data": self.data,
            "goal": fitted.goal.to_json(),
            "images": {"decide": len(self.held_out.decide), "report": len(self.held_out.report)},
            "before": {"params": fitted.before.params, "macs": fitted.before.macs, "accuracy": self.before.accuracy},
            "after": {"params": self.after.params, "macs": self.after.macs, "accuracy": self.after.accuracy},
            "drop": {**self.drop.to_json(), "bound": self.bound},
            "chosen": fitted.trial.to_json(),
            "trials": [trial.to_json() for trial in fitted.history],
        }


def outcome(fitted: Fitted, original: nn.Module, held_out: HeldOut, model: str, data: str) -> Outcome:
    """Score the original and the chosen network on the images that report."""
    before, after = (evaluate(one, held_out.report, name=model) for one in (original, fitted.model))
    assert before.answers is not None
    assert after.answers is not None
    return Outcome(fitted, model, data, held_out, before, after, drop_between(before.answers, after.answers))
