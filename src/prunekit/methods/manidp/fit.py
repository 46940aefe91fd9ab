"""Gates put into a network, and trained with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import surgery
from prunekit.data import Examples
from prunekit.devices import device_of
from prunekit.errors import InputError
from prunekit.evaluation.score import Score, scored
from prunekit.methods.manidp.budgets import GateState, calibrate, use_budget
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.costs import graph_of, share_for
from prunekit.methods.manidp.elastic import ElasticObjective, stored_budgets
from prunekit.methods.manidp.gating import plan_gates
from prunekit.methods.manidp.informed_start import IMAGES, inform
from prunekit.methods.manidp.objective import ManifoldObjective
from prunekit.methods.manidp.record import kept_share, observe
from prunekit.methods.manidp.thresholds import Batches, calibrate_kept
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.norms import present_norms, set_norms
from prunekit.programs.program import ExportedProgram
from prunekit.restoration.norm_alignment import aligned
from prunekit.spec import origin_of, remember
from prunekit.tasks.sets import all_inputs, labelled_batches
from prunekit.training.config import TrainConfig
from prunekit.training.entry import TrainResult, placed, train
from prunekit.training.events import Scored, Sink
from prunekit.training.world import join

_CALIBRATION = 2000  # training images that the final thresholds are set by
_NEAR = 0.01  # of the share asked for: thresholds of training that come so close stay


@dataclass(frozen=True)
class FinalKeep:
    """The share of a layer's channels, 0 to 1, that training images keep on average: `asked` for, with the thresholds
    of training (`trained`), and at the end (`kept`), at `macs` of the dense network's. `error` says why thresholds for
    the share asked for were not found.
    """

    asked: float
    trained: float
    kept: float
    macs: float
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dict(vars(self))


@dataclass(frozen=True)
class FinalBudget:
    """A budget that a network was trained for: the mean MACs of training images, as shares of the dense network's, that
    were asked for (`target`) and are `realised`; and the validation `score`, where there is a set. `error` says why no
    thresholds were found.
    """

    target: float
    realised: float | None = None
    score: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dict(vars(self))


@dataclass(frozen=True)
class GateTrainResult(TrainResult):
    """A finished run, `kept` with the final thresholds, and the share of channels that images `keep` by these; or, of a
    run for several, the `budgets` by name, of which the network has the first.
    """

    keep: FinalKeep = field(kw_only=True)
    budgets: Mapping[str, FinalBudget] = field(kw_only=True, default_factory=dict)


def add_gates(model: nn.Module, recipe: GateRecipe) -> nn.Module:
    """Return a copy of `model` with gates, which computes what `model` does: that is proven before it is returned.

    Raises:
        InputError: it has gates already, no layer that could have one, or is an exported program.
        SurgeryError: the gated network computes something else.
    """
    if isinstance(model, ExportedProgram):
        raise InputError(
            "an exported program does not keep gates apart",
            hint="give the checkpoint and its architecture (--arch), and export the gated network",
        )
    graph = graph_of(model)
    plan = plan_gates(model, graph, recipe).made_on(graph.example_shapes)
    gated = surgery.edit(model, plan, graph)
    surgery.verify(model, gated, plan, graph)
    origin = origin_of(gated)
    if origin is not None:
        step = {"method": "manidp", "settings": recipe.to_json(), "gates": len(plan.gates), **plan.notes}
        remember(gated, origin.after(step))
    return gated


def note_baseline(gated: nn.Module, source: nn.Module, data: Examples) -> Score:
    """Measure `source` on `data`, and note its score in the history of `gated`, in place."""
    found = scored(source, data)
    origin = origin_of(gated)
    if origin is not None:
        *earlier, last = origin.history
        remember(gated, replace(origin, history=(*earlier, {**last, "baseline_accuracy": found.accuracy})))
    return found


def fit(
    gated: nn.Module,
    recipe: GateRecipe,
    config: TrainConfig,
    train_set: Examples,
    val_set: Examples | None = None,
    *,
    teacher: nn.Module | None = None,
    state_path: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    on_event: Sink | None = None,
) -> GateTrainResult:
    """Train a gated network and its gates **in place**; see `prunekit.training.train`, whose loop it is.

    With `recipe.start` "informed", gates and layers are first set by some of the training images. Thresholds of
    training rank the mean saliencies of channels, of which single images may keep another share than asked for; unless
    `recipe.calibrate` is off, they are set at the end so that training images keep `recipe.keep` on average.

    With `recipe.budgets` every step has a budget of its own (`ElasticObjective`); the `teacher` is best the network
    without gates. At the end thresholds and batch-norm statistics are found for budgets all over the range, and stored.
    """
    view, kept = GatedView.of(gated), dict[str, float]()
    keep = recipe.keep if recipe.span is None else share_for(view.cost, sum(recipe.span) / 2)
    if recipe.informed and not resume:
        device = next(gated.parameters()).device
        images = all_inputs(train_set.sample(IMAGES, seed=config.seed))
        if not isinstance(images, Tensor):
            raise InputError("a network with several inputs cannot have gates")
        kept = inform(view, images.to(device), keep, recipe.ease, config.seed)
    aim = ManifoldObjective if recipe.span is None else ElasticObjective
    trained = train(
        gated,
        config,
        train_set,
        val_set,
        teacher=teacher,
        state_path=state_path,
        resume=resume,
        force=force,
        extra={"manidp": recipe.to_json()},
        objective=partial(aim, recipe=recipe, cost=view.cost, shares=kept),
        on_event=on_event,
    )
    images = train_set.sample(min(_CALIBRATION, len(train_set)), seed=config.seed)
    with placed([view.model], config, join(config.device)):
        batches = partial(labelled_batches, images, 250, device_of(view.model))
        budgets = {} if recipe.span is None else _budgets_met(view, recipe.span, batches, val_set)
        final = _keep_as_asked(view, keep, batches, exactly=recipe.calibrate and recipe.span is None)
        now = None if val_set is None else scored(view.model, val_set)
    last = trained.history[-1].epoch
    score = None if now is None else Scored(last, now.value, now.loss or 0.0)
    return GateTrainResult(trained.model, trained.history, trained.seconds, kept=score, keep=final, budgets=budgets)


def _keep_as_asked(view: GatedView, keep: float, batches: Batches, *, exactly: bool) -> FinalKeep:
    """Set the final thresholds, **in place**, where the share kept is to be met exactly; return what came of it."""
    trained = kept = kept_share(observe(view, batches()), view.cost)
    error = None
    if exactly and abs(trained - keep) > _NEAR * keep:
        try:
            kept = calibrate_kept(view, batches, keep).realised
        except InputError as refused:
            error = refused.message
    return FinalKeep(keep, trained, kept, observe(view, batches()).mean_macs / view.cost.dense, error)


def _budgets_met(
    view: GatedView, span: tuple[float, float], batches: Batches, val_set: Examples | None
) -> dict[str, FinalBudget]:
    """Find and store thresholds and statistics for budgets all over `span`, and score them; the first is left set."""
    found, dense = dict[str, FinalBudget](), view.cost.dense
    images = torch.cat([images for images, _ in batches()])
    # those of training are of all budgets, and thus of none
    set_norms(view.model, present_norms(aligned(view.model, view.graph, images)))
    start = GateState.of(view)
    for name, share in stored_budgets(*span).items():
        start.put_back(view)
        try:
            realised = calibrate(view, batches, share * dense, name).realised / dense
        except InputError as refused:
            found[name] = FinalBudget(share, error=refused.message)
            continue
        score = None if val_set is None else scored(view.model, val_set).value
        found[name] = FinalBudget(share, realised, score)
    met = next((name for name, budget in found.items() if budget.error is None), None)
    if met is not None:
        use_budget(view.model, met)
    return found
