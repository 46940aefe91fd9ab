"""Gates put into a network, and trained with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunekit import surgery
from prunekit.data import Examples
from prunekit.errors import InputError
from prunekit.evaluation.score import Score, scored
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.costs import graph_of
from prunekit.methods.manidp.gating import plan_gates
from prunekit.methods.manidp.informed_start import IMAGES, inform
from prunekit.methods.manidp.objective import ManifoldObjective
from prunekit.methods.manidp.record import kept_share, observe
from prunekit.methods.manidp.thresholds import calibrate_kept
from prunekit.methods.manidp.view import GatedView
from prunekit.programs.program import ExportedProgram
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
class GateTrainResult(TrainResult):
    """A finished run, `kept` with the final thresholds, and the share of channels that images `keep` by these."""

    keep: FinalKeep = field(kw_only=True)


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
    """
    view, kept = GatedView.of(gated), dict[str, float]()
    if recipe.start == "informed" and not resume:
        device = next(gated.parameters()).device
        images = all_inputs(train_set.sample(IMAGES, seed=config.seed))
        if not isinstance(images, Tensor):
            raise InputError("a network with several inputs cannot have gates")
        kept = inform(view, images.to(device), recipe.keep, recipe.ease, config.seed)
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
        objective=partial(ManifoldObjective, recipe=recipe, cost=view.cost, shares=kept),
        on_event=on_event,
    )
    final, now = _finished(view, recipe, config, train_set, val_set)
    last = trained.history[-1].epoch
    scored = None if now is None else Scored(last, now.value, now.loss or 0.0)
    return GateTrainResult(trained.model, trained.history, trained.seconds, kept=scored, keep=final)


def _finished(
    view: GatedView, recipe: GateRecipe, config: TrainConfig, train_set: Examples, val_set: Examples | None
) -> tuple[FinalKeep, Score | None]:
    """Set the final thresholds, **in place**; return what came of it, and how good the network is with them."""
    images = train_set.sample(min(_CALIBRATION, len(train_set)), seed=config.seed)
    with placed([view.model], config, join(config.device)):
        final = _keep_as_asked(view, recipe, images)
        score = None if val_set is None else scored(view.model, val_set)
    return final, score


def _keep_as_asked(view: GatedView, recipe: GateRecipe, images: Examples) -> FinalKeep:
    device = next(view.model.parameters()).device

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        return labelled_batches(images, 250, device)

    trained = kept = kept_share(observe(view, batches()), view.cost)
    error = None
    if recipe.calibrate and abs(trained - recipe.keep) > _NEAR * recipe.keep:
        try:
            kept = calibrate_kept(view, batches, recipe.keep).realised
        except InputError as refused:
            error = refused.message
    return FinalKeep(recipe.keep, trained, kept, observe(view, batches()).mean_macs / view.cost.dense, error)
