"""`prunekit eval`: what networks are worth, side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

import typer

from prunekit.cli.build import Command
from prunekit.cli.models import STREAM, describe_source, read_model, spec_of
from prunekit.cli.options import DATA, READING, DataOptions, ReadingOptions, choose_device, option
from prunekit.errors import CheckFailed, InputError
from prunekit.report import numbers
from prunekit.report.documents import eval_document
from prunekit.report.output import Output

if TYPE_CHECKING:
    from prunekit.cli.options import Split
    from prunekit.evaluation import EvalResult

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL", help="Model files or names; - for standard input.", show_default=False),
]


@dataclass(frozen=True)
class EvalOptions:
    """What is measured, and how."""

    split: str = option("test", choices=("test", "val", "train"), help="Which part of the data.")
    batch_size: int = option(256, help="Images at a time.")
    latency: bool = option(True, help="Measure the time of a forward pass.")
    latency_batch: int = option(1, help="Images in a timed pass.")
    threads: int | None = option(help="CPU threads during the timing.")
    device: str | None = option(metavar="DEVICE", help="cpu, cuda, ...; a GPU where there is one.")
    min_accuracy: float | None = option(metavar="SHARE", help="Exit 1 where a model's accuracy (0 to 1) is less.")


def run(output: Output, models: Models, data: DataOptions, options: EvalOptions, reading: ReadingOptions) -> None:
    """Measure each model, show them in one table, and check the accuracy asked for."""
    _check(models, data, options)
    results = [_measure(output, source, data, options, reading) for source in models]
    if output.json:
        output.document(eval_document([result.to_json() for result in results]))
    else:
        from prunekit.report.tables import results_table

        output.table(results_table(results), data=True)
    if options.min_accuracy is not None:
        _require(results, options.min_accuracy)


def _check(models: list[str], data: DataOptions, options: EvalOptions) -> None:
    if models.count(STREAM) > 1:
        raise InputError("standard input was given twice", hint="only one model can come from a pipe")
    if options.min_accuracy is not None and data.data is None:
        raise InputError("--min-accuracy needs --data")
    if options.min_accuracy is not None and not 0 <= options.min_accuracy <= 1:
        raise InputError(f"--min-accuracy {options.min_accuracy:g} is not a share", hint="90 % is 0.9")
    for name in ("batch_size", "latency_batch", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, found {value}")


def _measure(
    output: Output, source: str, data: DataOptions, options: EvalOptions, reading: ReadingOptions
) -> EvalResult:
    from prunekit.evaluation import evaluate
    from prunekit.report.progress import counting

    model, size = read_model(source, reading)
    spec = spec_of(model)
    images = data.open(output, cast("Split", options.split), spec, reading) if data.data is not None else None
    name = describe_source(source)
    with counting(output, f"evaluating {name}") as progress:
        result = evaluate(
            model,
            images,
            batch_size=options.batch_size,
            latency=options.latency,
            latency_batch=options.latency_batch,
            threads=options.threads,
            device=choose_device(options.device),
            name=name,
            on_progress=progress,
        )
    return dataclasses.replace(result, bytes=size if size is not None else result.bytes)


def _require(results: list[EvalResult], least: float) -> None:
    """Raise `CheckFailed` where a model is less accurate than was asked."""
    short = [result for result in results if result.accuracy is None or result.accuracy < least]
    if short:
        found = ", ".join(f"{result.model} has {numbers.percent(result.accuracy)}" for result in short)
        raise CheckFailed(f"less accurate than the {numbers.percent(least)} asked for: {found}")


COMMAND = Command(
    run,
    (
        "prunekit eval model.pt --data digits",
        "prunekit eval model.pt small.pt --data path/to/images",
        "prunekit eval small.pt --data cifar10 --data-root ~/data --min-accuracy 0.93",
        "prunekit eval torchvision:resnet18 torchvision:mobilenet_v2 --threads 1",
        "prunekit eval small.pt --data digits --json | jq .accuracy",
    ),
    {"data": DATA, "options": "Measuring", "reading": READING},
)
