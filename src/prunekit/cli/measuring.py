"""Measurement of networks for `eval`, `compare` and `sweep`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

import typer

from prunekit.cli.framework.options import DataOptions, ReadingOptions, choose_device, option
from prunekit.cli.models import STREAM, check_source, describe_source, read_model, spec_of
from prunekit.errors import InputError
from prunekit.methods.manidp.config import RUNTIMES
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import nn

    from prunekit.cli.framework.options import Split
    from prunekit.data import ImageSet
    from prunekit.evaluation.score import EvalResult

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL", help="Model files or names; - for standard input.", show_default=False),
]


@dataclass(frozen=True)
class MeasureOptions:
    """Options of the measurement."""

    split: str = option("test", choices=("test", "val", "train"), help="Split of the data set.")
    batch_size: int = option(256, help="Images per forward pass.")
    latency: bool = option(True, help="Measure the time of a forward pass.")
    latency_batch: int = option(1, help="Images in a timed pass.")
    threads: int | None = option(help="CPU threads during the timing.")
    device: str | None = option(metavar="DEVICE", help="cpu, cuda, ...; a GPU where there is one.")

    def check(self) -> None:
        """Raise `InputError` for counts below one."""
        for name in ("batch_size", "latency_batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, found {value}")


@dataclass(frozen=True)
class EvalOptions(MeasureOptions):
    """Options of the measurement, and requirements on its result."""

    runtime: str | None = option(
        choices=RUNTIMES, help="Runtime for networks with gates, in which accuracy and latency are measured."
    )
    budget: str | None = option(metavar="NAME", help="Thresholds of gates, stored by manidp calibrate under this name.")
    per_image: str | None = option(metavar="FILE", help="Write a line of CSV for each image: its MACs and its loss.")
    per_class: bool = option(False, help="Show the accuracy of each class, and the class it is mostly mistaken for.")
    min_accuracy: float | None = option(metavar="SHARE", help="Exit 1 where a model's accuracy (0 to 1) is less.")


def measure_all(
    output: Output, sources: list[str], data: DataOptions, options: MeasureOptions, reading: ReadingOptions
) -> list[EvalResult]:
    """Read and measure each model in `sources`; one of them may be standard input."""
    return [result for _, _, result in measured(output, sources, data, options, reading)]


def measured(
    output: Output,
    sources: list[str],
    data: DataOptions,
    options: MeasureOptions,
    reading: ReadingOptions,
    prepare: Callable[[nn.Module], object] = lambda _: None,
) -> Iterator[tuple[nn.Module, ImageSet | None, EvalResult]]:
    """Yield each model, after `prepare` has seen it, with the images that it was measured on and its result."""
    if sources.count(STREAM) > 1:
        raise InputError("standard input was given twice", hint="only one model can come from a pipe")
    data.check()
    reading.check()
    for source in sources:
        check_source(source)
    for number, source in enumerate(sources):
        model, size = read_model(source, reading)
        prepare(model)
        images = open_images(output, model, data, options, reading)
        result = measure(model, describe_source(source), images, options)
        if number == 0:  # all are measured on the same images
            warn_of_balance(output, result)
        yield model, images, dataclasses.replace(result, bytes=size if size is not None else result.bytes)


def warn_of_balance(output: Output, result: EvalResult) -> None:
    """Warn where plain accuracy misleads, because most images are of one class."""
    from prunekit.report.terminal.classes import unbalanced

    beware = unbalanced(result.answers, result.accuracy) if result.answers is not None else None
    if beware is not None:
        output.warn(beware)


def open_images(
    output: Output, model: nn.Module, data: DataOptions, options: MeasureOptions, reading: ReadingOptions
) -> ImageSet | None:
    """Return the images to measure on, prepared for the model; None without `--data`."""
    if data.data is None:
        return None
    from prunekit.data import labelled_for

    return labelled_for(model, data.open(output, cast("Split", options.split), spec_of(model), reading))


def measure(model: nn.Module, name: str, images: ImageSet | None, options: MeasureOptions) -> EvalResult:
    """Measure one network, called `name`."""
    from prunekit.evaluation.score import evaluate

    spec_of(model)
    return evaluate(
        model,
        images,
        batch_size=options.batch_size,
        latency=options.latency,
        latency_batch=options.latency_batch,
        threads=options.threads,
        device=choose_device(options.device),
        name=name,
    )
