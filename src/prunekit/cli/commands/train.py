"""`prunekit train`: train or fine-tune any model, optionally with Network Slimming's penalty."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli.framework.build import Command
from prunekit.cli.framework.events import sinks
from prunekit.cli.framework.options import DATA, READING, DataOptions, OutputOptions, ReadingOptions, input_spec, option
from prunekit.cli.history import remember_run
from prunekit.cli.models import (
    STREAM,
    check_inputs,
    check_kind,
    open_for,
    output_path,
    read_model,
    read_teacher,
    write_model,
)
from prunekit.errors import InputError
from prunekit.report import numbers
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output
from prunekit.report.terminal.tuning import say_kept
from prunekit.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from prunekit.data import Examples
    from prunekit.spec import InputSpec
    from prunekit.training.entry import TrainResult

ModelOrNothing = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Model to fine-tune; without it --arch is trained from scratch.", show_default=False
    ),
]


@dataclass(frozen=True)
class RunOptions:
    """Options around a run."""

    resume: bool = option(False, help="Go on with an interrupted run: the same command, and this flag.")
    teacher: str | None = option(flag="--distill", metavar="MODEL", help="Distil from the outputs of this model.")
    tensorboard: str | None = option(metavar="FOLDER", help="Folder for TensorBoard's files.")


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, prepared before it starts."""

    model: nn.Module
    train_set: Examples
    val_set: Examples
    teacher: nn.Module | None
    target: Path
    tunes: bool

    @property
    def state(self) -> Path:
        """The file that holds the state of the run while it lasts."""
        return self.target.with_suffix(".state")

    @property
    def metrics(self) -> Path:
        """The file for the figures of the run, one line of JSON per event."""
        return self.target.with_suffix(".metrics.jsonl")


def run(
    output: Output,
    *,
    model: ModelOrNothing = None,
    data: DataOptions,
    config: TrainConfig,
    where: OutputOptions,
    options: RunOptions,
    reading: ReadingOptions,
) -> None:
    """Train, write the artefact, and show the result."""
    config.check()
    job = prepare(output, model, data, config, where, reading, options)
    from prunekit.training.entry import train
    from prunekit.training.fine_tuning import cut_since_training, suited

    images, taught = len(job.train_set), job.teacher is not None
    cut = cut_since_training(job.model)
    config = suited(config, images, cut, taught=taught) if job.tunes else config.suited_to(images)
    if where.dry_run:
        _show(output, job, config)
        return
    with sinks(output, job.metrics, options.tensorboard, lambda: _say_before(output, job, config)) as sink:
        result = train(
            job.model,
            config,
            job.train_set,
            job.val_set,
            teacher=job.teacher,
            state_path=job.state,
            resume=options.resume,
            force=where.force,
            on_event=sink,
        )
    finish(output, job, job.model, result, config, force=where.force)


def prepare(
    output: Output,
    source: str | None,
    data: DataOptions,
    config: TrainConfig,
    where: OutputOptions,
    reading: ReadingOptions,
    options: RunOptions,
    *,
    suffix: str = "trained",
) -> Job:
    """Check the arguments, then read the model and the images. `suffix` ends the name of the artefact."""
    if (source or reading.arch) is None:
        raise InputError("nothing to train", hint="name a model file, or an architecture with --arch NAME")
    if where.out == STREAM:
        raise InputError("a trained model goes to a file: its state lies beside it", hint="name one with -o FILE")
    target = Path(output_path(source or str(reading.arch), where, suffix, output))
    check_inputs(source, data, reading, images_needed=True)
    if source is not None:
        model, _ = read_model(source, reading)
        check_kind(model, str(target))
        train_set = open_for(output, model, data, "train", reading)
    else:
        model, train_set = _from_scratch(output, data, config, reading)
    teacher = read_teacher(options.teacher, reading)
    val_set = open_for(output, model, data, "val", reading)
    return Job(model, train_set, val_set, teacher, target, tunes=source is not None)


def _say_before(output: Output, job: Job, config: TrainConfig) -> None:
    """Say what people should know before a network is trained."""
    from prunekit.report.terminal.tuning import say_validation, warn_of_few_steps
    from prunekit.training.fine_tuning import FEWEST_STEPS

    if job.tunes:
        say_validation(output, job.val_set)
    warn_of_few_steps(output, len(job.train_set), config.batch, FEWEST_STEPS)


def _from_scratch(
    output: Output, data: DataOptions, config: TrainConfig, reading: ReadingOptions
) -> tuple[nn.Module, Examples]:
    """Build a network with an output for each class, where it accepts their number; return it and the examples.

    The classes are those of `--classes`, or else those of the data. A network for another task is built as it is.
    """
    import torch

    from prunekit import models
    from prunekit.data import ImageSet
    from prunekit.spec import remember_classes
    from prunekit.tasks.sets import fitted_to

    names = reading.class_names()
    arch, arguments = str(reading.arch), reading.arguments()
    default = models.default_input(arch, arguments)
    # the data set knows its own normalisation better than an architecture does
    shape = dataclasses.replace(default, mean=(), std=()) if default else None
    spec = input_spec(reading, shape)
    # nothing is assumed of a network that is only now trained
    spec = spec and dataclasses.replace(spec, assumed=False)
    train_set = data.open(output, "train", spec, reading)
    torch.manual_seed(config.seed)
    if not isinstance(train_set, ImageSet):
        return _with_input(models.build(arch, arguments), spec or train_set.input_spec), train_set
    told = "num_classes" in (arguments or {}) or not models.takes(arch, "num_classes")
    count = len(names or train_set.classes)
    model = models.build(arch, arguments, num_classes=None if told else count)
    model = remember_classes(_with_input(model, train_set.input_spec), names or ())
    return model, fitted_to(model, train_set)


def _with_input(model: nn.Module, spec: InputSpec | None) -> nn.Module:
    """Make `spec` what the network remembers to read, in place; return it."""
    from prunekit.spec import Origin, origin_of, remember

    return remember(model, dataclasses.replace(origin_of(model) or Origin(""), input=spec))


def _show(output: Output, job: Job, config: TrainConfig) -> None:
    """Show what would be done."""
    from prunekit import api

    cost = api.inspect(job.model).cost
    facts = {
        "output": None,
        "settings": config.settings(),
        "images": len(job.train_set),
        "validation_images": len(job.val_set),
        "before": cost.to_json(),
        "after": cost.to_json(),
    }
    if output.json:
        output.document(document("train", facts))
        return
    output.data(
        f"would train {job.target} for {numbers.counted(config.epochs, 'epoch')} on "
        f"{numbers.counted(len(job.train_set), job.train_set.noun)} "
        f"({len(job.val_set)} for validation): {cost.params:,} parameters, {cost.macs:,} MACs"
    )


def finish(
    output: Output,
    job: Job,
    trained: nn.Module,
    result: TrainResult,
    config: TrainConfig,
    *,
    force: bool,
    name: str = "train",
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the artefact of a run, delete its state, and show the result.

    `facts` are the fields of its document `name` beside those that all runs have.
    """
    remember_run(trained, job.train_set, config, result)
    write_model(trained, str(job.target), output, force=force)
    if output.first:
        job.state.unlink(missing_ok=True)
    last, step = result.history[-1], result.step(config)
    if output.json:
        fields = {
            "output": str(job.target),
            "metrics": str(job.metrics),
            "settings": config.settings(),
            "accuracy": result.accuracy,
            "score": result.score,
            "metric": result.metric.to_json(),
            "loss": result.loss,
            "sparsity": last.sparsity,
            "history": [dataclasses.asdict(event) for event in result.history],
            "seconds": result.seconds,
            **({"kept": step["kept"]} if "kept" in step else {}),
            **(facts or {}),
        }
        output.document(document(name, fields))
        return
    say_kept(output, step.get("kept"))
    figure = f"validation {result.metric.name} {numbers.score(result.metric, result.score)}"
    output.note(f"{figure} after {numbers.duration(result.seconds)}")
    output.data(str(job.target))


COMMAND = Command(
    run,
    (
        "prunekit train --arch vgg16_cifar --data cifar10 --data-root ~/data --epochs 160",
        "prunekit train --arch vgg_digits --data digits --sparsity 1e-3 -o sparse.pt",
        "prunekit train small.pt --data path/to/images --epochs 20 --lr 0.01",
        "prunekit train small.pt --data digits --distill model.pt",
        "prunekit train small.pt --data path/to/images --epochs 20 --lr 0.01 --resume",
        "prunekit train --arch nets.py:unet --task segmentation --data path/to/scenes --epochs 20 -o unet.pt",
        "prunekit train --arch nets.py:m5 --task tasks.py:Keywords --epochs 20 -o audio.pt",
        "torchrun --nproc-per-node 4 -m prunekit train --arch resnet50 --data path/to/images",
    ),
    {"data": DATA, "config": "Training", "where": "Output", "options": "The run", "reading": READING},
    {"distill": "--distill-share"},
)
