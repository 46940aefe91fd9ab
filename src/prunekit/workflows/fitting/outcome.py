"""What a finished search comes to on the images that did not decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.data import Examples
from prunekit.evaluation.drops import drop_between, measured
from prunekit.evaluation.paired import Drop, ScoreDrop
from prunekit.evaluation.score import EvalResult
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
    held_out: HeldOut[Examples]
    before: EvalResult
    after: EvalResult
    drop: Drop | ScoreDrop

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
            "metric": self.before.metric.to_json() if self.before.metric else None,
            "before": {"params": fitted.before.params, "macs": fitted.before.macs, **_figures(self.before)},
            "after": {"params": self.after.params, "macs": self.after.macs, **_figures(self.after)},
            "drop": {**self.drop.to_json(), "bound": self.bound},
            "chosen": fitted.trial.to_json(),
            "trials": [trial.to_json() for trial in fitted.history],
        }


def outcome(fitted: Fitted, original: nn.Module, held_out: HeldOut[Examples], model: str, data: str) -> Outcome:
    """Score the original and the chosen network on the images that report."""
    before, after = (measured(one, held_out.report, model) for one in (original, fitted.model))
    return Outcome(fitted, model, data, held_out, before.result, after.result, drop_between(before, after))


def _figures(found: EvalResult) -> dict[str, Any]:
    """Return the score as JSON, of classification as an accuracy as well."""
    return {"score": found.score} | ({} if found.accuracy is None else {"accuracy": found.accuracy})
