"""Additions of `eval` for networks with gates: other runtimes, each one's latency, and a line for each image."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.gates import has_gates
from prunekit.cli.models import spec_of
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import nn

    from prunekit.cli.measuring import EvalOptions
    from prunekit.data import Examples, ImageSet
    from prunekit.evaluation.score import EvalResult
    from prunekit.methods.manidp.record import Record
    from prunekit.methods.manidp.view import GatedView


def measure_runtimes(
    output: Output, model: nn.Module, images: Examples | None, result: EvalResult, options: EvalOptions
) -> EvalResult:
    """Return the result with accuracy and latency of the requested runtime, and the latency of all."""
    if not has_gates(model):
        return result
    from prunekit.methods.manidp.record import observe
    from prunekit.methods.manidp.view import GatedView

    view, facts = GatedView.of(model, result.graph), dict(result.gates or {})
    if options.per_image is not None:
        from prunekit.data import ImageSet

        assert isinstance(images, ImageSet)
        _write_csv(Path(options.per_image), observe(view, images.batches(options.batch_size)), images)
    if options.runtime is not None:
        result = _run_as(output, view, images, result, options, facts)
    if options.latency:
        facts["runtimes_ms"] = _latencies(output, view, options)
    return dataclasses.replace(result, gates=facts)


def show(output: Output, result: EvalResult) -> None:
    """Show the gates of a result as tables for people."""
    if result.gates is not None:
        from prunekit.report.terminal.gates import gates_table

        output.table(gates_table(result.model, result.gates), data=True)


def _run_as(
    output: Output,
    view: GatedView,
    images: Examples | None,
    result: EvalResult,
    options: EvalOptions,
    facts: dict[str, Any],
) -> EvalResult:
    """Return the result with accuracy and latency of the requested runtime; an approximate one answers differently."""
    import torch

    from prunekit.evaluation.latency import measure_latency
    from prunekit.evaluation.score import scored
    from prunekit.methods.manidp.runtimes.choose import accelerate

    batch = options.latency_batch
    runner, facts["runtime"] = accelerate(view.model, str(options.runtime), batch=batch, view=view)
    result = dataclasses.replace(result, runtime=facts["runtime"])
    if options.latency:
        example = (torch.zeros(1, *spec_of(view.model).shape),)
        timing = measure_latency(runner, example, batch=batch, threads=options.threads)
        result = dataclasses.replace(result, latency_ms=timing)
    if images is not None and facts["runtime"] == "buckets":
        score = scored(runner, images, batch_size=options.batch_size)
        facts["masked_accuracy"] = result.accuracy
        result = result.scored(score)
        output.note(f"{result.model}: accuracy is that of the static sub-networks, an approximation")
    return result


def _latencies(output: Output, view: GatedView, options: EvalOptions) -> dict[str, float]:
    """Return the median milliseconds of each runtime and of the dense network without gates, timed in turns."""
    from prunekit.evaluation.latency import threads_limited
    from prunekit.methods.manidp.runtimes import choose

    model, batch = view.model, options.latency_batch
    names = choose.available(model, batch)
    networks = {"dense": choose.dense(copy.deepcopy(model), batch)}
    with threads_limited(options.threads):
        networks |= {name: choose.accelerate(model, name, batch=batch, view=view)[0] for name in names}
        seconds = choose.medians(networks, choose.images_like(model, batch))
    slow = [name for name in names if seconds[name] >= seconds["dense"]]
    if slow:
        output.warn(f"not faster than the dense network here: {', '.join(slow)}")
    return {name: 1e3 * value for name, value in seconds.items()}


def _write_csv(path: Path, record: Record, images: ImageSet) -> None:
    from prunekit.files.writing import atomic_write
    from prunekit.report.terminal.tables import csv_text

    columns = ("image", "label", "correct", "loss", "macs", "kept")
    kept = record.kept.sum(1).tolist()
    rows = zip(
        range(len(kept)),
        images.labels.tolist(),
        (int(right) for right in record.correct.tolist()),
        record.losses.tolist(),
        (round(macs) for macs in record.macs.tolist()),
        kept,
        strict=True,
    )
    content = csv_text(columns, list(rows)).encode()
    atomic_write(path, lambda stream: stream.write(content))
