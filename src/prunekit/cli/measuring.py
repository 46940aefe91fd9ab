"""Measurement of networks and of exported files for `eval`, `compare` and `sweep`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from prunekit.cli import gates
from prunekit.cli.framework.options import DataOptions, ReadingOptions, device_option, input_spec, option
from prunekit.cli.models import STREAM, check_source, describe_source, open_for, read_model, spec_of, without_budget
from prunekit.errors import InputError
from prunekit.methods.manidp.config import RUNTIMES
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import nn

    from prunekit.cli.framework.options import Split
    from prunekit.data import Examples
    from prunekit.evaluation.score import EvalResult

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="Model files or names, or folders of export --buckets; - for standard input. "
        "FILE@BUDGET takes a stored budget of a network with gates.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class MeasureOptions:
    """Options of the measurement."""

    split: str = option("test", choices=("test", "val", "train"), help="Split of the data set.")
    batch_size: int = option(256, help="Images per forward pass.")
    latency: bool = option(True, help="Measure the time of a forward pass.")
    latency_batch: int = option(1, help="Images in a timed pass.")
    threads: int | None = option(help="CPU threads during the timing.")
    device: str | None = device_option()

    def check(self) -> None:
        """Raise `InputError` for counts below one."""
        for name in ("batch_size", "latency_batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, found {value}")


@dataclass(frozen=True)
class CompareOptions(MeasureOptions):
    """Options of the measurement of several networks."""

    budget: str | None = option(
        metavar="NAME",
        help="Thresholds of gates, stored by manidp calibrate under this name; FILE@NAME says it for one model.",
    )


@dataclass(frozen=True)
class EvalOptions(CompareOptions):
    """Options of the measurement, and requirements on its result."""

    runtime: str | None = option(
        choices=RUNTIMES, help="Runtime for networks with gates, in which accuracy and latency are measured."
    )
    per_image: str | None = option(metavar="FILE", help="Write a line of CSV for each image: its MACs and its loss.")
    per_class: bool = option(False, help="Show the accuracy of each class, and the class it is mostly mistaken for.")
    min_accuracy: float | None = option(metavar="SHARE", help="Exit 1 where a model's accuracy (0 to 1) is less.")
    min_score: float | None = option(metavar="NUMBER", help="Exit 1 where the score of a model's task is worse.")


@dataclass(frozen=True)
class Measured:
    """A network, the examples that it was measured on, and the result."""

    model: nn.Module
    images: Examples | None
    result: EvalResult


def measured(
    output: Output, sources: list[str], data: DataOptions, options: CompareOptions, reading: ReadingOptions
) -> Iterator[Measured]:
    """Read all models, one of which may be standard input, then measure them one by one."""
    files = [without_budget(source) for source in sources]
    if [file for file, _ in files].count(STREAM) > 1:
        raise InputError("standard input was given twice", hint="only one model can come from a pipe")
    data.check()
    reading.check()
    for file, _ in files:
        check_source(file)
    models = [_read(output, file, reading, options) for file, _ in files]
    flags = {name: getattr(options, name, None) for name in ("budget", "runtime", "per_image")}
    gates.check_flags([model for model, _ in models], flags)
    for source, (_, budget), (model, _) in zip(sources, files, models, strict=True):
        gates.choose_budget(model, source, budget, options.budget)
    for number, (source, (model, size)) in enumerate(zip(sources, models, strict=True)):
        images = open_images(output, model, data, options, reading)
        result = measure(output, model, describe_source(source), images, options)
        if number == 0:  # all are measured on the same images
            warn_of_balance(output, result)
        yield Measured(model, images, dataclasses.replace(result, bytes=size if size is not None else result.bytes))


def _read(
    output: Output, source: str, reading: ReadingOptions, options: MeasureOptions
) -> tuple[nn.Module, int | None]:
    """Return a network, or exported files in their runtime, and the size of its files in bytes."""
    from prunekit.evaluation.latency import threads_limited
    from prunekit.exporting.onnx_files import check_size, looks_like_onnx, read_onnx
    from prunekit.methods.manidp.runtimes.folder import is_bucket_folder, read_buckets
    from prunekit.spec import Origin, origin_of, remember

    read = read_buckets if is_bucket_folder(source) else read_onnx if looks_like_onnx(source) else None
    if read is None:
        return read_model(source, reading, options.device)
    with threads_limited(options.threads):  # a session keeps the number that it began with
        model = read(source)
    origin = origin_of(model) or Origin("")
    spec = input_spec(reading, origin.input)
    if spec is not None:
        check_size(model, source, spec.shape)
    remember(model, dataclasses.replace(origin, input=spec))
    if options.latency and model.batch not in (None, options.latency_batch):
        output.note(f"{source} takes batches of {model.batch} alone: its latency is that of {model.batch} images")
    return model, model.size


def warn_of_balance(output: Output, result: EvalResult) -> None:
    """Warn where plain accuracy misleads, because most images are of one class."""
    from prunekit.report.terminal.classes import unbalanced

    beware = unbalanced(result.answers, result.accuracy) if result.answers is not None else None
    if beware is not None:
        output.warn(beware)


def open_images(
    output: Output, model: nn.Module, data: DataOptions, options: MeasureOptions, reading: ReadingOptions
) -> Examples | None:
    """Return the examples to measure on, prepared for the model; None without data."""
    if not data.given:
        return None
    return open_for(output, model, data, cast("Split", options.split), reading)


def measure(
    output: Output, model: nn.Module, name: str, images: Examples | None, options: MeasureOptions
) -> EvalResult:
    """Measure one network, called `name`; MACs that depend on the image are the mean, with gates and routers."""
    from prunekit.data import ImageSet
    from prunekit.evaluation.exported import evaluate_exported
    from prunekit.evaluation.score import evaluate
    from prunekit.exporting.runtimes import ExportedClassifier

    if images is None or isinstance(images, ImageSet):
        spec_of(model)
    timing = {"latency": options.latency, "latency_batch": options.latency_batch, "threads": options.threads}
    common: dict[str, Any] = {"name": name, "batch_size": options.batch_size, **timing}
    if isinstance(model, ExportedClassifier):
        return gates.with_mean_of_buckets(output, model, images, evaluate_exported(model, images, **common))
    result = evaluate(model, images, **common)
    if not gates.has_gates(model):
        return result
    return gates.with_mean_cost(output, model, images, result, options.batch_size)
