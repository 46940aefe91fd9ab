"""Evaluation of exported files in the runtimes that run them elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch

from prunekit.data import Examples
from prunekit.errors import InputError
from prunekit.evaluation.latency import measure_latency
from prunekit.evaluation.score import EvalResult, scored
from prunekit.exporting.runtimes import ExportedClassifier
from prunekit.progress import counter
from prunekit.spec import origin_of


def evaluate_exported(
    model: ExportedClassifier,
    data: Examples | None,
    *,
    name: str,
    batch_size: int = 256,
    latency: bool = False,
    latency_batch: int = 1,
    threads: int | None = None,
) -> EvalResult:
    """Measure exported files on the CPU; the arguments are as for `prunekit.evaluation.score.evaluate`.

    Files for one batch size alone are timed with batches of that size.

    Raises:
        InputError: The data does not fit the files, or their input is unknown.
    """
    origin = origin_of(model)
    if origin is None or origin.input is None:
        raise InputError(f"{name} does not say how large its input is", hint="add --input-size, such as 3x224x224")
    count = counter(f"evaluating {Path(name).name}")
    score = scored(model, data, batch_size=batch_size, on_progress=count) if data is not None else None
    example = torch.zeros(1, *origin.input.shape)
    timing = measure_latency(model, [example], batch=model.batch or latency_batch, threads=threads) if latency else None
    result = EvalResult(
        model=name,
        accuracy=None,
        accuracy_top5=None,
        loss=None,
        images=0,
        params=model.params,
        macs=model.macs,
        bytes=model.size,
        latency_ms=timing,
        runtime=model.runtime,
    )
    return result.scored(score)
