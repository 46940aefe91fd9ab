"""Restoring from images and tuning in passes, for the commands of methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.framework.events import sinks
from prunekit.cli.framework.options import DataOptions, OutputOptions, ReadingOptions, Split, option
from prunekit.cli.healing import HealOptions
from prunekit.cli.models import open_for, read_teacher, spec_of
from prunekit.errors import InputError
from prunekit.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from prunekit.data import Examples, ImageSet
    from prunekit.report.terminal.output import Output
    from prunekit.restoration.images import Images, LabelledImages
    from prunekit.workflows.passes import PassResult

TUNING = "Tuning (with --data)"


@dataclass(frozen=True)
class PassOptions:
    """Number of passes, and what is kept of them."""

    iterations: int = option(1, metavar="COUNT", help="Passes of prune and tune towards the one target.")
    calibration: int = option(1000, metavar="COUNT", help="Training images to restore from, without labels.")
    scratch: bool = option(False, help="Tune from new random weights: the control experiment of pruning.")
    resume: bool = option(False, help="Go on with an interrupted run: the same command, and this flag.")
    teacher: str | None = option(
        flag="--distill",
        metavar="MODEL",
        help="Distil from the outputs of this model (default: the unpruned one; --distill-share 0: from none).",
    )
    tensorboard: str | None = option(metavar="FOLDER", help="Folder for TensorBoard's files.")
    pictures: str | None = option(metavar="FOLDER", help="Draw gammas, widths and accuracies there (needs Matplotlib).")


@dataclass(frozen=True)
class Tuning(TrainConfig):
    """Settings of training, with defaults for tuning a pruned network."""

    epochs: int = option(0, help="Passes over the training images after each pruning; 0 leaves the network untuned.")


def check(data: DataOptions, tuning: Tuning, passes: PassOptions, target: str, *, heals: bool = False) -> None:
    """Raise `InputError` for flags that exclude each other."""
    if heals and data.of_task:
        raise InputError("healing is of classifiers of images, and --task names another", hint="tune with --epochs")
    if not data.given and (tuning.epochs or (passes.resume and not heals)):
        raise InputError("tuning needs images", hint="say which with --data digits, a folder or a data set's name")
    if not tuning.epochs and (passes.iterations > 1 or (passes.resume and not heals) or passes.scratch):
        raise InputError("several passes, --resume and --scratch need a tuning", hint="add --epochs")
    if tuning.epochs:
        tuning.check()
        if target == "-":
            raise InputError("a tuned model goes to a file: its state lies beside it", hint="name one with -o FILE")


@dataclass(frozen=True)
class Job:
    """One call of a method's command, parsed and checked."""

    output: Output
    name: str
    network: nn.Module
    config: Any
    target: str
    where: OutputOptions
    data: DataOptions
    passes: PassOptions
    tuning: Tuning
    reading: ReadingOptions
    healing: HealOptions = field(default_factory=HealOptions)

    @property
    def steps(self) -> Path:
        """The folder of a run's finished steps while it lasts."""
        return Path(self.target).with_suffix(".steps")

    def images(self, split: Split, *, lazy: bool = False) -> Examples:
        """Return the examples of a split, prepared for the network."""
        return open_for(self.output, self.network, self.data, split, self.reading, lazy=lazy)


def calibration_images(job: Job, train_set: Examples | None = None) -> Images | LabelledImages | None:
    """Return normalised training images, with labels for a method that reads them; None without `--data`."""
    if not job.data.given:
        return None
    from prunekit.workflows.calibration import drawn

    return drawn(job.name, train_set or job.images("train", lazy=True), job.passes.calibration)


def images_to_heal_on(job: Job) -> ImageSet:
    """Return the images that the network was restored from, as a set."""
    from prunekit.workflows.calibration import sampled

    images = job.data.images(job.output, "train", spec_of(job.network), job.reading, lazy=True)
    return sampled(images, job.passes.calibration)


def tune(job: Job) -> tuple[nn.Module, list[PassResult], float]:
    """Run the passes; return the tuned network, each pass, and the accuracy before. The steps' folder stays."""
    from prunekit.evaluation.score import scored
    from prunekit.report.terminal.passes import say_pass
    from prunekit.report.terminal.tuning import say_validation, warn_of_few_steps
    from prunekit.training.fine_tuning import FEWEST_STEPS
    from prunekit.workflows.passes import PassImages, PassSchedule, run_passes

    train_set, val_set, test_set, options = job.images("train"), job.images("val"), job.images("test"), job.passes

    def say_before() -> None:
        say_validation(job.output, val_set)
        warn_of_few_steps(job.output, len(train_set), job.tuning.suited_to(len(train_set)).batch, FEWEST_STEPS)

    images = PassImages(train_set, val_set, test_set, calibration_images(job, train_set))
    teacher = _teacher(job)
    start = scored(job.network, test_set).value
    with sinks(job.output, Path(job.target).with_suffix(".metrics.jsonl"), options.tensorboard, say_before) as sink:
        tuned, results = run_passes(
            job.name,
            job.network,
            job.config,
            images,
            PassSchedule(job.tuning, options.iterations, teacher, options.scratch),
            job.steps,
            resume=options.resume,
            on_event=sink,
            on_pass=lambda done: say_pass(job.output, done, len(test_set)),
        )
    return tuned, results, start


def _teacher(job: Job) -> nn.Module | None:
    """Return the network to distil from: the one that was named, or else the one that is pruned.

    Tuned on a small part of what it was trained on, a network forgets the rest; its original still knows it.
    """
    if job.tuning.distill == 0:
        return None
    return read_teacher(job.passes.teacher, job.reading) or (None if job.passes.scratch else job.network)


def draw(folder: str, before: nn.Module, after: nn.Module, notes: dict[str, Any]) -> None:
    """Draw the gammas and the widths before and after."""
    from prunekit import api
    from prunekit.report.pictures import png

    widths = [
        {layer.name: layer.channels for layer in api.inspect(m).cost.layers if layer.channels} for m in (before, after)
    ]
    gammas = png.gammas_chart(png.gammas_of(before), png.gammas_of(after), notes.get("threshold"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    png.draw([png.widths_chart(*widths)], Path(folder) / "widths.png")
    png.draw([gammas], Path(folder) / "gammas.png")
