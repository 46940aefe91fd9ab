"""Gates put into a network, and trained with it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from prunekit import surgery
from prunekit.data import ImageSet
from prunekit.errors import InputError
from prunekit.evaluation.score import evaluate
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.costs import graph_of
from prunekit.methods.manidp.gating import plan_gates
from prunekit.methods.manidp.informed_start import IMAGES, inform
from prunekit.methods.manidp.objective import ManifoldObjective
from prunekit.methods.manidp.view import GatedView
from prunekit.programs.program import ExportedProgram
from prunekit.spec import origin_of, remember
from prunekit.training.config import TrainConfig
from prunekit.training.entry import TrainResult, train
from prunekit.training.events import Sink


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


def note_baseline(gated: nn.Module, source: nn.Module, data: ImageSet) -> float:
    """Measure what `source` gets right of `data`, and note it in the history of `gated`, in place; 0 to 1."""
    found = evaluate(source, data).accuracy or 0.0
    origin = origin_of(gated)
    if origin is not None:
        *earlier, last = origin.history
        remember(gated, replace(origin, history=(*earlier, {**last, "baseline_accuracy": found})))
    return found


def fit(
    gated: nn.Module,
    recipe: GateRecipe,
    config: TrainConfig,
    train_set: ImageSet,
    val_set: ImageSet | None = None,
    *,
    teacher: nn.Module | None = None,
    state_path: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    on_event: Sink | None = None,
) -> TrainResult:
    """Train a gated network and its gates **in place**; see `prunekit.training.train`, whose loop it is.

    With `recipe.start` "informed", gates and layers are first set by some of the training images.
    """
    view, kept = GatedView.of(gated), dict[str, float]()
    if recipe.start == "informed" and not resume:
        device = next(gated.parameters()).device
        images = train_set.sample(IMAGES, seed=config.seed).inputs()
        kept = inform(view, images.to(device), recipe.keep, recipe.ease, config.seed)
    return train(
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
