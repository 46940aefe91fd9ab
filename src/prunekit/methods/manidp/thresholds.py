"""Thresholds for a budget or for a share of channels, found on calibration images.

Every layer's threshold is a quantile of the saliencies that it gave on these images. The thresholds of training say
which quantile each layer starts from, and the odds of all are multiplied by one number, found by bisection on the mean
MACs: a network that meets the target already keeps its thresholds, and one without any gets the same quantile
everywhere. Thresholds change what later gates see, so the MACs are measured again until they meet the target. A share
of kept channels is met in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.devices import precise
from prunekit.errors import InputError, counted
from prunekit.methods.manidp.costs import DynamicCost
from prunekit.methods.manidp.record import Record, observe, unlabelled
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import same_thresholds
from prunekit.progress import counter, report_progress

_ROUNDS = 8
_HALVINGS = 30
SPAN = 40.0  # shifts further than this close, or open, everything
_NONE = 1e-3  # a layer that closes nothing counts as closing this share
_CLOSE = 0.002  # of the target: near enough
_REFUSED = 0.02  # of the target: too far
FEWEST = 64  # images

Batches = Callable[[], Iterable[tuple[Tensor, Tensor | None]]]


@dataclass(frozen=True)
class Calibration:
    """Thresholds that meet a budget: `target` and the `realised` mean MACs on the calibration images, gates not
    counted (or, of `calibrate_kept`, shares of kept channels); `thresholds` and the realised share of kept channels by
    layer; the mean quantile that the thresholds are.
    """

    target: float
    realised: float
    quantile: float
    thresholds: dict[str, float]
    kept: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dict(vars(self))


def calibrate_kept(view: GatedView, batches: Batches, share: float) -> Calibration:
    """Set the thresholds of a network, in eval mode, **in place** so that images keep `share` (0 to 1) of the channels
    of a layer, averaged over layers and images. `batches` is as for `calibrate`.

    Raises:
        InputError: too few images, or a share that no thresholds meet; the thresholds are then as before.
    """
    widths = torch.tensor(view.cost.channels, dtype=torch.float64)
    goal = Goal(share, lambda kept: (kept.double() / widths).mean(1), "a mean share of kept channels", (1, 0))
    return set_thresholds(view, batches, goal)


@dataclass(frozen=True)
class Goal:
    """A `target`, and the `amount` `(N,)` that images take of it when they keep some channels `(N, layers)`;
    `ends` are the amounts with every channel kept and with none.
    """

    target: float
    amount: Callable[[Tensor], Tensor]
    what: str
    ends: tuple[float, float]

    def mean(self, kept: Tensor) -> float:
        """Return the mean amount over images."""
        return float(self.amount(kept).mean())


def set_thresholds(view: GatedView, batches: Batches, goal: Goal) -> Calibration:
    """Set the thresholds of a network, **in place**, so that images take what the goal says on average.

    Raises:
        InputError: too few images, or a goal that no thresholds meet; the thresholds are then as before.
    """
    layers = view.layers.values()
    with same_thresholds(layers):
        best = _search(view, batches, goal)
    for layer, value in zip(layers, best.thresholds.values(), strict=True):
        layer.threshold.fill_(value)
    return best


def _search(view: GatedView, batches: Batches, goal: Goal) -> Calibration:
    """Look the quantile up in the saliencies first seen, measure what it really costs, and correct the aim by that."""
    target = goal.target
    first = observe(view, unlabelled(batches()), saliencies=True)
    if len(first.kept) < FEWEST:
        raise too_few(len(first.kept))
    family = Thresholds.around(view, first)
    aim, best = target, None
    low, high = -SPAN, SPAN  # shifts known to cost too much, and little enough
    count = counter("setting thresholds")
    for done in range(_ROUNDS):
        count(done, _ROUNDS)
        shift = family.shift_for(first.saliencies, goal.mean, aim)
        shift = shift if low < shift < high else (low + high) / 2
        values = family.at(shift)
        for layer, value in zip(view.layers.values(), values, strict=True):
            layer.threshold.fill_(value)
        with report_progress(None):
            record = observe(view, unlabelled(batches()))
        found = _calibration(goal, family.quantile(shift), values, record, view.cost)
        if best is None or abs(found.realised - target) < abs(best.realised - target):
            best = found
        if abs(best.realised - target) <= _CLOSE * target:
            break
        low, high = (shift, high) if found.realised > target else (low, shift)
        aim += target - found.realised
    assert best is not None
    if abs(best.realised - target) > _REFUSED * target:
        most, least = goal.ends
        raise InputError(
            f"no thresholds give {goal.what} of {_figure(target)}; the nearest found is {_figure(best.realised)}",
            hint=f"with no channel kept an image costs {_figure(least)}, with all {_figure(most)}",
        )
    return best


def too_few(images: int) -> InputError:
    """Return the error that so many images are no ground for thresholds."""
    return InputError(f"too few to set thresholds by: {counted(images, 'image')}", hint=f"give at least {FEWEST}")


def _figure(amount: float) -> str:
    return f"{amount:,.0f}" if amount > 1 else f"{amount:.3g}"


@dataclass(frozen=True)
class Thresholds:
    """Thresholds for any budget: in each layer a quantile of its saliencies, whose log-odds differ from those of the
    present threshold by a shift that all layers share. `ordered` holds each layer's saliencies, ascending.
    """

    ordered: tuple[Tensor, ...]
    odds: tuple[float, ...]

    @classmethod
    def around(cls, view: GatedView, record: Record) -> Thresholds:
        """Return thresholds around the present ones of a network, whose saliencies `record` holds."""
        ordered = tuple(pi.flatten().sort().values for pi in record.saliencies)
        odds = []
        for layer, values in zip(view.layers.values(), ordered, strict=True):
            below = float(precise(values < layer.threshold.to(values)).mean())
            odds.append(log_odds(below))
        return cls(ordered, tuple(odds))

    def at(self, shift: float) -> list[float]:
        """Return the threshold of each layer; past its last saliency, more than any."""
        places = [
            int(_share(odds + shift) * len(values) + 1e-6) for values, odds in zip(self.ordered, self.odds, strict=True)
        ]
        return [
            float(values[place]) if place < len(values) else float(values[-1]) * 2 + 1
            for values, place in zip(self.ordered, places, strict=True)
        ]

    def shift_for(self, saliencies: Sequence[Tensor], mean: Callable[[Tensor], float], aim: float) -> float:
        """Return the shift at which images cost at most `aim` on average.

        `saliencies` are those that they have, `(N, c)` of each layer; `mean` tells the cost from the numbers of
        channels `(N, layers)` that they keep.
        """
        low, high = -SPAN, SPAN
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            limits = self.at(middle)
            kept = [((pi >= limit) & (pi > 0)).sum(1) for pi, limit in zip(saliencies, limits, strict=True)]
            if mean(torch.stack(kept, 1)) > aim:
                low = middle
            else:
                high = middle
        return high

    def quantile(self, shift: float) -> float:
        """Return the mean of the layers' quantiles."""
        return sum(_share(odds + shift) for odds in self.odds) / len(self.odds)


def log_odds(share: float) -> float:
    """Return the log-odds of a share, held off 0 and 1."""
    share = min(max(share, _NONE), 1 - _NONE)
    return math.log(share / (1 - share))


def _share(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))


def _calibration(goal: Goal, quantile: float, values: list[float], record: Record, cost: DynamicCost) -> Calibration:
    rates = record.kept.double().mean(0) / torch.tensor(cost.channels)
    return Calibration(
        target=goal.target,
        realised=goal.mean(record.kept),
        quantile=quantile,
        thresholds=dict(zip(cost.layers, values, strict=True)),
        kept=dict(zip(cost.layers, rates.tolist(), strict=True)),
    )
