"""Budgets of a gated network: thresholds and batch-norm statistics for each, found on images, and stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.devices import device_of
from prunekit.errors import InputError
from prunekit.healing.norms import Statistics, measured, move, statistics_of
from prunekit.methods.manidp.thresholds import FEWEST, Batches, Calibration, Goal, set_thresholds, too_few
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import gated_layers
from prunekit.nn.norms import present_norms, set_norms, store_norms, use_norms


def calibrate(view: GatedView, batches: Batches, target: float, name: str) -> Calibration:
    """Set the thresholds of a network, in eval mode, **in place** so that its mean MACs are `target`, and store them as
    budget `name`. `batches` gives the calibration images, anew each time it is called; labels are not read.

    The statistics of its batch norms move to those thresholds as they do on these images, and are stored with the
    budget: with those of another budget the answers are far worse than they can be.

    Raises:
        InputError: too few images, or a target that no thresholds meet; the thresholds are then as before.
    """
    return _calibrate(view, batches, target, name, _Norms.of(view, batches))


def calibrate_all(view: GatedView, batches: Batches, targets: Mapping[str, float]) -> dict[str, Calibration]:
    """Calibrate a network for the mean MACs of each name in `targets`, as `calibrate` does, each from the same start;
    it is left with the first.

    Raises:
        InputError: as for `calibrate`; the budgets found before are stored, and the network is as it was otherwise.
    """
    start, found = GateState.of(view), dict[str, Calibration]()
    norms = _Norms.of(view, batches) if targets else None
    for name, target in targets.items():
        start.put_back(view)
        found[name] = _calibrate(view, batches, target, name, norms)
    if found:
        use_budget(view.model, next(iter(found)))
    return found


def _calibrate(view: GatedView, batches: Batches, target: float, name: str, norms: _Norms | None) -> Calibration:
    cost = view.cost
    goal = Goal(target, cost.macs, "mean MACs", (cost.dense, cost.least))
    start = GateState.of(view)
    try:
        found = set_thresholds(view, batches, goal)
        if norms is not None:
            norms.follow(view)
            found = set_thresholds(view, batches, goal)  # what the gates read has moved
    except BaseException:
        start.put_back(view)
        raise
    for layer in view.layers.values():
        layer.budgets[name] = float(layer.threshold)
    store_norms(view.model, name)
    return found


def use_budget(model: nn.Module, name: str) -> None:
    """Set the thresholds, in place, that were stored for budget `name`, and the batch-norm statistics stored with them.

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
    use_norms(model, name)


def used_budget(model: nn.Module) -> str | None:
    """Return the name of the stored budget whose thresholds a network has; None where it has others, or no gates."""
    layers = [layer for _, layer in gated_layers(model)]

    def has(name: str) -> bool:
        return all(float(layer.threshold) == float(layer.threshold.new_tensor(layer.budgets[name])) for layer in layers)

    return next((name for name in (layers[0].budgets if layers else ()) if has(name)), None)


@dataclass(frozen=True)
class GateState:
    """The thresholds of a network, and the running statistics of its batch norms."""

    thresholds: tuple[float, ...]
    norms: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, view: GatedView) -> GateState:
        """Return what a network has at present."""
        return cls(tuple(float(layer.threshold) for layer in view.layers.values()), present_norms(view.model))

    def put_back(self, view: GatedView) -> None:
        """Give it to the network again, **in place**."""
        for layer, value in zip(view.layers.values(), self.thresholds, strict=True):
            layer.threshold.fill_(value)
        set_norms(view.model, self.norms)


@dataclass(frozen=True)
class _Norms:
    """The statistics that a network's batch norms have (`before`), and those that `images` show with the same
    thresholds; with others they move by as much as what the images show does.
    """

    images: Tensor
    before: Statistics
    shown: Statistics

    @classmethod
    def of(cls, view: GatedView, batches: Batches) -> _Norms | None:
        """Return those of a network; None where it has no batch norms."""
        before = statistics_of(view.model)
        if not before:
            return None
        images = torch.cat([images for images, _ in batches()]).to(device_of(view.model))
        if len(images) < FEWEST:
            raise too_few(len(images))
        return cls(images, before, measured(view.model, view.graph, images))

    def follow(self, view: GatedView) -> None:
        """Move the statistics to the present thresholds, **in place**."""
        move(view.model, self.before, self.shown, measured(view.model, view.graph, self.images))
