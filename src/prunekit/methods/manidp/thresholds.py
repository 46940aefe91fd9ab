"""Thresholds for a budget, found on calibration images.

Every layer's threshold is the same quantile of the saliencies that it gave on these images; the quantile is found by
bisection on the mean MACs. Thresholds change what later gates see, so the saliencies are measured again until the mean
MACs that the network really has meet the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.methods.manidp.costs import DynamicCost
from prunekit.methods.manidp.record import Record, observe
from prunekit.surgery.gated import gated_layers

_ROUNDS = 8
_HALVINGS = 20
_CLOSE = 0.002  # of the target: near enough
_REFUSED = 0.02  # of the target: too far
FEWEST = 64  # images

Batches = Callable[[], Iterable[tuple[Tensor, Tensor | None]]]


@dataclass(frozen=True)
class Calibration:
    """Thresholds that meet a budget: `target` and the `realised` mean MACs on the calibration images, gates not
    counted; `thresholds` and the realised share of kept channels by layer; the quantile that all thresholds are.
    """

    target: float
    realised: float
    quantile: float
    thresholds: dict[str, float]
    kept: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return dict(vars(self))


def calibrate(model: nn.Module, cost: DynamicCost, batches: Batches, target: float, name: str) -> Calibration:
    """Set the thresholds of `model`, in eval mode, **in place** so that its mean MACs are `target`, and store them as
    budget `name`. `batches` gives the calibration images, anew each time it is called; labels are not read.

    Raises:
        InputError: too few images, or a target that no thresholds meet; the thresholds are then as before.
    """
    layers = dict(gated_layers(model))
    before = [layer.threshold.clone() for layer in layers.values()]
    try:
        best = _search(model, cost, batches, target)
    except InputError:
        for layer, threshold in zip(layers.values(), before, strict=True):
            layer.threshold.copy_(threshold)
        raise
    for layer, value in zip(layers.values(), best.thresholds.values(), strict=True):
        layer.threshold.fill_(value)
        layer.budgets[name] = value
    return best


def use_budget(model: nn.Module, name: str) -> None:
    """Set the thresholds, in place, that were stored for budget `name`.

    Raises:
        InputError: none were.
    """
    layers = [layer for _, layer in gated_layers(model)]
    known = list(layers[0].budgets) if layers else []
    if name not in known:
        hint = "it has " + ", ".join(known) if known else "prunekit manidp calibrate --target-macs stores some"
        raise InputError(f"no budget '{name}' is stored in this network", hint=hint)
    for layer in layers:
        layer.threshold.fill_(layer.budgets[name])


def _search(model: nn.Module, cost: DynamicCost, batches: Batches, target: float) -> Calibration:
    """Look the quantile up in the saliencies first seen, measure what it really costs, and correct the aim by that."""
    layers = dict(gated_layers(model))
    first = observe(model, cost, batches(), saliencies=True)
    if len(first.kept) < FEWEST:
        raise InputError(f"{len(first.kept)} images are too few to set thresholds by", hint=f"give at least {FEWEST}")
    ordered = ordered_saliencies(first)
    aim, best = target, None
    for _ in range(_ROUNDS):
        quantile = _quantile(ordered, first.saliencies, cost, aim)
        values = thresholds_at(ordered, quantile)
        for layer, value in zip(layers.values(), values, strict=True):
            layer.threshold.fill_(value)
        record = observe(model, cost, batches())
        found = _calibration(target, quantile, values, record, cost)
        if best is None or abs(found.realised - target) < abs(best.realised - target):
            best = found
        if abs(best.realised - target) <= _CLOSE * target:
            break
        aim += target - found.realised
    assert best is not None
    if abs(best.realised - target) > _REFUSED * target:
        raise InputError(
            f"no thresholds give mean MACs of {target:,.0f}; the nearest found is {best.realised:,.0f}",
            hint=f"with no channel kept an image costs {cost.least:,}, with all {cost.dense:,}",
        )
    return best


def _quantile(ordered: list[Tensor], saliencies: tuple[Tensor, ...], cost: DynamicCost, aim: float) -> float:
    """The quantile at which these saliencies would cost at most `aim` MACs on average."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        limits = thresholds_at(ordered, middle)
        kept = [((pi >= limit) & (pi > 0)).sum(1) for pi, limit in zip(saliencies, limits, strict=True)]
        if float(cost.macs(torch.stack(kept, 1)).mean()) > aim:
            low = middle
        else:
            high = middle
    return high


def ordered_saliencies(record: Record) -> list[Tensor]:
    """All saliencies of each layer, ascending."""
    return [pi.flatten().sort().values for pi in record.saliencies]


def thresholds_at(ordered: list[Tensor], quantile: float) -> list[float]:
    """That quantile of each layer's saliencies; past the last, more than any."""
    places = [int(quantile * len(values)) for values in ordered]
    return [
        float(values[place]) if place < len(values) else float(values[-1]) * 2 + 1
        for values, place in zip(ordered, places, strict=True)
    ]


def _calibration(target: float, quantile: float, values: list[float], record: Record, cost: DynamicCost) -> Calibration:
    rates = record.kept.double().mean(0) / torch.tensor(cost.channels)
    return Calibration(
        target=target,
        realised=record.mean_macs,
        quantile=quantile,
        thresholds=dict(zip(cost.layers, values, strict=True)),
        kept=dict(zip(cost.layers, rates.tolist(), strict=True)),
    )
