"""The network of one point of a sweep: pruned and perhaps tuned, or with gates and trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit import api
from prunekit.data import Examples
from prunekit.errors import InputError
from prunekit.methods.budget import check_ratio, read_amount
from prunekit.methods.manidp.budgets import calibrate
from prunekit.methods.manidp.config import RATE, GateRecipe
from prunekit.methods.manidp.costs import DynamicCost, share_for
from prunekit.methods.manidp.fit import add_gates, fit
from prunekit.methods.manidp.view import GatedView
from prunekit.restoration.images import Images, LabelledImages
from prunekit.tasks.sets import labelled_batches
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import Sink
from prunekit.training.fine_tuning import cut_since_training, suited
from prunekit.workflows.calibration import drawn, example_for
from prunekit.workflows.sweeps.points import GATES, Variant, settings_of


@dataclass(frozen=True)
class Material:
    """What the networks of a sweep are made from.

    Attributes:
        model: The network; it stays unchanged.
        images: Images to restore from, the same for all seeds; or None, and they are drawn from `train_set`.
        train_set: Labelled images, or the examples that a task has opened, to tune on.
        val_set: Examples that decide which epoch of a tuning is kept.
        calibration: How many images are drawn to restore from.
        tuning: Settings of the tuning after each pruning, and of the training of gates; None for no tuning.
        on_event: Called with the events of each tuning.
    """

    model: nn.Module
    images: Images | LabelledImages | None = None
    train_set: Examples | None = None
    val_set: Examples | None = None
    calibration: int = 1000
    tuning: TrainConfig | None = None
    on_event: Sink | None = None

    def images_for(self, method: str, seed: int) -> Images | LabelledImages | None:
        """Return the images that `method` restores from."""
        if self.images is not None or self.train_set is None:
            return self.images
        return drawn(method, self.train_set, self.calibration, seed)


@dataclass(frozen=True)
class Made:
    """A network, and what its tuning came to (see `TrainResult.step`)."""

    model: nn.Module
    kept: Mapping[str, Any] | None = None


def make(material: Material, variant: Variant, axis: str, budget: float | str, seed: int) -> Made:
    """Return the network of one point.

    Raises:
        PrunekitError: The method refuses the network or the budget, or a tuning cannot go on.
        Interrupted: A signal stopped a tuning.
    """
    build = _with_gates if variant.method == GATES else _pruned
    return build(material, variant, axis, budget, seed)


def _pruned(material: Material, variant: Variant, axis: str, budget: float | str, seed: int) -> Made:
    """Prune, and tune where that is asked for."""
    seeds = {"seed": seed} if "seed" in settings_of(variant.method).__dataclass_fields__ else {}
    config = api.make_config(variant.method, **{**seeds, **variant.settings, axis: budget})
    images = material.images_for(variant.method, seed)
    small = api.prune(
        variant.method, material.model, example_for(material.train_set), config=config, images=images
    ).model
    if material.tuning is None:
        return Made(small)
    train_set, asked = _to_train_on(material), dataclasses.replace(material.tuning, seed=seed)
    teacher = None if asked.distill == 0 else material.model
    tuning = suited(asked, len(train_set), cut_since_training(small), taught=teacher is not None)
    done = train(small, tuning, train_set, material.val_set, teacher=teacher, on_event=material.on_event)
    return Made(small, done.step(tuning).get("kept"))


def _with_gates(material: Material, variant: Variant, axis: str, budget: float | str, seed: int) -> Made:
    """Train gates to keep what the budget leaves; for a target in MACs, set their thresholds to the rest.

    MACs are the mean over images, with those of the gates themselves.
    """
    if axis not in ("ratio", "target_macs"):
        raise InputError(
            "gates remove no parameters, and the time they take is no budget",
            hint="sweep manidp over --ratios or --target-macs",
        )
    if material.tuning is None:
        raise InputError("manidp trains gates, which takes epochs", hint="say how many with --epochs")
    train_set, recipe, wanted = _to_train_on(material), GateRecipe(**{**variant.settings, "keep": 1.0}), None
    if recipe.budgets is not None:
        raise InputError("a sweep trains gates for each of its budgets by itself", hint="leave budgets= out of manidp")
    if axis == "ratio":
        keep = 1 - check_ratio(budget)
    else:
        cost = GatedView.of(add_gates(material.model, recipe)).cost
        wanted = read_amount("--target-macs", budget, cost.dense) - cost.gates
        keep = _keep_rate(cost, wanted)
    recipe = dataclasses.replace(recipe, keep=keep)
    gated = add_gates(material.model, recipe)
    asked = material.tuning
    config = dataclasses.replace(asked, seed=seed, keep="last", lr=RATE if asked.lr is None else asked.lr)
    fit(gated, recipe, config, train_set, material.val_set, on_event=material.on_event)
    gated.eval()
    if wanted is not None:
        chosen = train_set.sample(min(2 * material.calibration, len(train_set)), seed=seed)
        calibrate(GatedView.of(gated), lambda: labelled_batches(chosen, 250), wanted, str(budget))
    return Made(gated)


def _keep_rate(cost: DynamicCost, wanted: float) -> float:
    """Return the share of channels, the same in each gated layer, that costs `wanted` MACs, gates not counted.

    Raises:
        InputError: Even gates that close everything leave more.
    """
    if wanted <= cost.least:
        raise InputError(
            f"gates cannot reach that: with all channels closed, an image costs {cost.least + cost.gates:,} MACs"
        )
    return share_for(cost, wanted / cost.dense)


def _to_train_on(material: Material) -> Examples:
    if material.train_set is None:
        raise InputError("tuning needs images", hint="say which with --data digits, a folder or a data set's name")
    return material.train_set
