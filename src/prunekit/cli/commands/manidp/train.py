"""`prunekit manidp train`: add gates to a network and train it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prunekit.cli.commands.train import Job, RunOptions, finish, prepare
from prunekit.cli.framework.build import Command
from prunekit.cli.framework.events import sinks
from prunekit.cli.framework.options import (
    DATA,
    READING,
    DataOptions,
    ModelArgument,
    OutputOptions,
    ReadingOptions,
    option,
)
from prunekit.methods.manidp.config import RATE, GateRecipe
from prunekit.report import numbers
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output
from prunekit.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from prunekit.methods.manidp.fit import FinalKeep, GateTrainResult


@dataclass(frozen=True)
class GateTraining(TrainConfig):
    """Settings of training, with the paper's defaults for gates."""

    epochs: int = option(40, help="Passes over the training images.")
    lr: float | None = option(None, help="Learning rate at its peak (default: 0.05; with --budgets that of tuning).")
    weight_decay: float = option(5e-4, help="Weight decay; the gates have none.")
    keep: str | None = option("last", hidden=True)  # the best ones are those before the gates close

    def as_published(self) -> GateTraining:
        """Return these settings with the paper's learning rate, where it is open."""
        return self if self.lr is not None else replace(self, lr=RATE)


def run(
    output: Output,
    *,
    model: ModelArgument,
    data: DataOptions,
    recipe: GateRecipe,
    config: GateTraining,
    where: OutputOptions,
    options: RunOptions,
    reading: ReadingOptions,
) -> None:
    """Add gates to the network, train it, write the artefact, and show the result."""
    config.check()
    job = prepare(output, model, data, config, where, reading, options, suffix="gated")
    from prunekit.methods.manidp.fit import add_gates, fit, note_baseline

    gated = add_gates(job.model, recipe)
    if where.dry_run:
        _show(output, job, gated)
        return
    teacher, suited = _suited(job, recipe, config)
    baseline = note_baseline(gated, job.model, job.val_set)
    figure = numbers.score(baseline.metric, baseline.value)
    output.note(f"validation {baseline.metric.name} {figure} before the gates")
    with sinks(output, job.metrics, options.tensorboard) as sink:
        result = fit(
            gated,
            recipe,
            suited,
            job.train_set,
            job.val_set,
            teacher=teacher,
            state_path=job.state,
            resume=options.resume,
            force=where.force,
            on_event=sink,
        )
    keep = result.keep
    facts = {
        "gates": recipe.to_json(),
        "baseline_accuracy": baseline.accuracy,
        "baseline_score": baseline.value,
        "kept": keep.kept,
        "macs": keep.macs,
    }
    facts["keep"] = keep.to_json()
    facts["budgets"] = {name: budget.to_json() for name, budget in result.budgets.items()}
    if result.budgets:
        _say_budgets(output, result)
    else:
        _say(output, keep)
    finish(output, job, gated, result, suited, force=where.force, name="manidp.train", facts=facts)


def _suited(job: Job, recipe: GateRecipe, config: GateTraining) -> tuple[nn.Module | None, TrainConfig]:
    """Return the teacher and the settings of the run; for several budgets the original is the teacher."""
    images = len(job.train_set)
    if recipe.span is None:
        return job.teacher, config.as_published().suited_to(images)
    from prunekit.training.fine_tuning import suited

    teacher = job.model if job.teacher is None else job.teacher
    return teacher, suited(config, images, 1 - recipe.span[0], taught=True)


def _say(output: Output, keep: FinalKeep) -> None:
    """Say which share of the channels images keep in the end, with a warning where it is not the one asked for."""
    share = numbers.percent(keep.kept, decimals=1)
    found = f"training images keep {share} of the channels, at {numbers.percent(keep.macs, decimals=1)} of the MACs"
    asked = f"{numbers.percent(keep.asked, decimals=1)} asked for"
    if keep.error is not None:
        output.warn(f"{found}, {asked}: {keep.error}")
    elif keep.kept != keep.trained:
        trained = numbers.percent(keep.trained, decimals=1)
        output.note(f"{found} ({asked}; {trained} before the thresholds were calibrated)")
    else:
        output.note(f"{found} ({asked})")


def _say_budgets(output: Output, result: GateTrainResult) -> None:
    """Show what each budget costs and scores, with a warning where no thresholds were found for one."""
    from prunekit.report.terminal.tables import table

    rows = []
    for name, budget in result.budgets.items():
        if budget.realised is None:
            output.warn(f"{name}: {budget.error}")
            continue
        score = "" if budget.score is None else numbers.score(result.metric, budget.score)
        rows.append((name, numbers.percent(budget.realised, decimals=1), score))
    rows.sort(key=lambda row: float(row[0].rstrip("%")))
    output.table(table(["budget", "MACs", f"validation {result.metric.name}"], rows, left=1), data=False)


def _show(output: Output, job: Job, gated: object) -> None:
    """Show which layers would get gates, and why others would not."""
    from torch import nn

    from prunekit.methods.manidp.view import GatedView
    from prunekit.report.terminal.tables import table
    from prunekit.spec import origin_of

    assert isinstance(gated, nn.Module)
    cost = GatedView.of(gated).cost
    origin = origin_of(gated)
    left = dict(origin.history[-1].get("left", {})) if origin else {}
    if output.json:
        layers = dict(zip(cost.layers, cost.channels, strict=True))
        facts = {"output": None, "layers": layers, "left": left, "dense_macs": cost.dense, "gate_macs": cost.gates}
        output.document(document("manidp.train", facts))
        return
    rows = [(name, "gated", str(width)) for name, width in zip(cost.layers, cost.channels, strict=True)]
    rows += [(name, why, "") for name, why in left.items()]
    output.note(f"would write {job.target}")
    output.table(table(["layer", "", "channels"], rows, left=2), data=True)


COMMAND = Command(
    run,
    (
        "prunekit manidp train model.pt --data digits --epochs 20 --keep 0.6 -o gated.pt",
        "prunekit manidp train model.pt --data path/to/images --epochs 100 --resume",
        "prunekit manidp train model.pt --data path/to/images --epochs 30 --budgets 35%-80%",
        "prunekit manidp train model.pt --data path/to/images --no-complexity --no-similarity",
        "torchrun --nproc-per-node 4 -m prunekit manidp train model.pt --data path/to/images",
    ),
    {
        "recipe": "Gates",
        "data": DATA,
        "config": "Training",
        "where": "Output",
        "options": "The run",
        "reading": READING,
    },
    {"distill": "--distill-share"},
)
