"""`prunekit eval`: accuracy, cost and speed of networks, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import DATA, READING, DataOptions, ReadingOptions
from prunekit.cli.gate_runtimes import measure_runtimes, show
from prunekit.cli.measuring import EvalOptions, Models, measured
from prunekit.errors import CheckFailed, InputError
from prunekit.report import numbers
from prunekit.report.documents import eval_document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from prunekit.evaluation.score import EvalResult


def run(output: Output, models: Models, data: DataOptions, options: EvalOptions, reading: ReadingOptions) -> None:
    """Measure each model, show them in one table, and check the required accuracy."""
    _check(models, data, options)
    results = [
        measure_runtimes(output, found.model, found.images, found.result, options)
        for found in measured(output, models, data, options, reading)
    ]
    if output.json:
        output.document(eval_document([_facts(result, options) for result in results]))
    else:
        from prunekit.report.terminal.tables import latency_note, results_table

        output.table(results_table(results), data=True)
        if note := latency_note(results):
            output.note(note)
        if options.per_class:
            from prunekit.report.terminal.classes import classes_table

            output.table(classes_table(results), data=True)
        for result in results:
            show(output, result)
    if options.min_accuracy is not None:
        _require(results, options.min_accuracy)
    if options.min_score is not None:
        _require_score(results, options.min_score)


def _check(models: list[str], data: DataOptions, options: EvalOptions) -> None:
    options.check()
    if options.per_image is not None and (not data.given or data.of_task or len(models) != 1):
        raise InputError("--per-image needs --data, with images to classify, and a single model")
    if options.per_class and (not data.given or data.of_task):
        raise InputError("--per-class needs --data, with images to classify")
    for flag, value in (("--min-accuracy", options.min_accuracy), ("--min-score", options.min_score)):
        if value is not None and not data.given:
            raise InputError(f"{flag} needs --data")
    if options.min_accuracy is not None and not 0 <= options.min_accuracy <= 1:
        raise InputError(f"--min-accuracy {options.min_accuracy:g} is not a share", hint="90 % is 0.9")


def _facts(result: EvalResult, options: EvalOptions) -> dict[str, Any]:
    """Return a result as JSON, with its classes where requested."""
    facts = result.to_json()
    if options.per_class and result.answers is not None:
        facts["per_class"] = [score.to_json() for score in result.answers.per_class]
    return facts


def _require(results: list[EvalResult], least: float) -> None:
    """Raise `CheckFailed` where a model is less accurate than required."""
    short = [result for result in results if result.accuracy is None or result.accuracy < least]
    if short:
        found = ", ".join(f"{result.model} has {numbers.percent(result.accuracy)}" for result in short)
        raise CheckFailed(f"less accurate than the {numbers.percent(least)} asked for: {found}")


def _require_score(results: list[EvalResult], least: float) -> None:
    """Raise `CheckFailed` where the score of a model's task is worse than required."""
    metric = results[0].metric
    assert metric is not None
    short = [result for result in results if metric.beats(least, result.score or 0.0)]
    if short:
        found = ", ".join(f"{result.model} has {numbers.score(metric, result.score)}" for result in short)
        raise CheckFailed(f"a worse {metric.name} than the {numbers.score(metric, least)} asked for: {found}")


COMMAND = Command(
    run,
    (
        "prunekit eval model.pt --data digits",
        "prunekit eval model.pt small.pt --data path/to/images",
        "prunekit eval small.pt --data cifar10 --data-root ~/data --min-accuracy 0.93",
        "prunekit eval torchvision:resnet18 torchvision:mobilenet_v2 --threads 1",
        "prunekit eval small.pt --data path/to/images --per-class",
        "prunekit eval weights.pth --arch resnet50 --data path/to/some/classes --classes names.txt",
        "prunekit eval small.pt --data digits --json | jq .accuracy",
        "prunekit eval unet.pt --task segmentation --data path/to/scenes --min-score 0.8",
        "prunekit eval audio.pt --task tasks.py:Keywords --task-args folder=clips --min-score 0.9",
        "prunekit eval gated.pt --data digits --budget 50% --runtime auto",
        "prunekit eval gated.pt@40% gated.pt@60% --data digits",
    ),
    {"data": DATA, "options": "Measuring", "reading": READING},
)
