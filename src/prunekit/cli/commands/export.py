"""`prunekit export`: a file that needs neither prunekit nor the model's code, compared with the model first."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prunekit.cli.build import Command
from prunekit.cli.models import STREAM, output_path, read_model, spec_of
from prunekit.cli.options import DATA, READING, DataOptions, ModelArgument, OutputOptions, ReadingOptions, option
from prunekit.errors import InputError
from prunekit.report.documents import document
from prunekit.report.output import Output
from prunekit.report.progress import counting

if TYPE_CHECKING:
    from torch import nn

    from prunekit.checkpoint.export import Batch, Exported, Format
    from prunekit.cli.options import Split
    from prunekit.data import ImageSet
    from prunekit.evaluation import Latency

_BATCH_SIZE = 256


@dataclass(frozen=True)
class FileOptions:
    """What kind of file."""

    format: str | None = option(
        choices=("onnx", "pt2"),
        help="onnx, or pt2 (torch.export); by default what the output's suffix says, else onnx.",
    )
    opset: int | None = option(
        metavar="VERSION", help="ONNX's operator set, 18 or later; the exporter's own if not said."
    )
    fixed_batch: int | None = option(help="Allow this one batch size; without it any size will do.")
    fold_bn: bool = option(False, help="Make batch norms part of the convolutions in front of them.")


@dataclass(frozen=True)
class CheckOptions:
    """How the file is compared with the model."""

    split: str = option("test", choices=("test", "val", "train"), help="Which part of the data.")
    tolerance: float = option(1e-4, help="Largest difference of outputs, relative to the largest output above 1.")
    min_agreement: float = option(1.0, metavar="SHARE", help="Least share (0 to 1) of images with the same top class.")
    latency: bool = option(True, help="Measure the time of a forward pass of both.")
    threads: int | None = option(help="CPU threads during the timing.")


def run(
    output: Output,
    model: ModelArgument,
    file: FileOptions,
    where: OutputOptions,
    data: DataOptions,
    check: CheckOptions,
    reading: ReadingOptions,
) -> None:
    """Export, compare, write, and show both side by side."""
    from prunekit.checkpoint.export import ExportOptions, exported
    from prunekit.surgery.trace import example_of

    _check(file, check)
    format = _format(file, where)
    target = output_path(model, where, "", output, kind=f".{format}")
    network, size = read_model(model, reading)
    spec = spec_of(network)
    images = data.open(output, cast("Split", check.split), spec, reading) if data.data is not None else None
    options = ExportOptions(file.opset, file.fixed_batch, file.fold_bn, check.tolerance, check.min_agreement)
    batches = _batches(images, output) if images is not None else None
    done = exported(network, example_of(network, (1, *spec.shape)), format, options, batches)
    times = _latencies(network, done, file.fixed_batch or 1, check) if check.latency else {}
    written = None if where.dry_run else _write(done, target, output, force=where.force)
    _report(output, written, done, times, size)


def _check(file: FileOptions, check: CheckOptions) -> None:
    for name, value in (("opset", file.opset), ("fixed-batch", file.fixed_batch), ("threads", check.threads)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, found {value}")
    if not check.tolerance > 0:
        raise InputError(f"--tolerance must be positive, found {check.tolerance:g}")
    if not 0 <= check.min_agreement <= 1:
        raise InputError(f"--min-agreement {check.min_agreement:g} is not a share", hint="99.9 % is 0.999")


def _format(file: FileOptions, where: OutputOptions) -> Format:
    """What was asked for: by --format, by the suffix of --output, or else ONNX."""
    from prunekit.checkpoint.export import format_of

    named = format_of(where.out) if where.out is not None and where.out != STREAM else None
    asked = cast("Format | None", file.format)
    if asked and named and asked != named:
        raise InputError(f"--format {asked} and --output {where.out} disagree", hint="one of them is enough")
    format = asked or named or "onnx"
    if file.opset is not None and format != "onnx":
        raise InputError("--opset is ONNX's: a .pt2 file has none")
    return format


def _batches(images: ImageSet, output: Output) -> Iterator[Batch]:
    """All images, with the progress shown."""
    seen = 0
    with counting(output, "comparing") as progress:
        for batch, labels in images.batches(_BATCH_SIZE):
            yield batch, labels
            seen += len(labels)
            progress(seen, len(images))


def _latencies(network: nn.Module, done: Exported, batch: int, check: CheckOptions) -> dict[str, Latency]:
    """Of the model in PyTorch, and of the file in what runs it, with the same number of threads."""
    import torch

    from prunekit.checkpoint.runtimes import OnnxModel
    from prunekit.evaluation import evaluate, measure_latency, threads_limited

    with threads_limited(check.threads):
        if done.format == "onnx":
            runtime: nn.Module = OnnxModel(done.content)
        else:
            runtime = torch.export.load(io.BytesIO(done.content)).module()
        example = torch.zeros(1, *spec_of(network).shape)
        own = evaluate(network, latency=True, latency_batch=batch, device="cpu").latency_ms
        assert own is not None
        return {"model": own, "exported": measure_latency(runtime, (example,), batch=batch)}


def _write(done: Exported, target: str, output: Output, *, force: bool) -> str:
    from prunekit import checkpoint

    if target == STREAM:
        output.binary(done.content)
    else:
        checkpoint.atomic_write(Path(target), lambda stream: stream.write(done.content), force=force)
    return target


def _report(output: Output, written: str | None, done: Exported, times: dict[str, Latency], size: int | None) -> None:
    if output.json:
        facts: dict[str, Any] = {
            "output": written,
            "format": done.format,
            "opset": done.opset,
            "bytes": len(done.content),
            "folded": list(done.folded),
            "parity": dict(vars(done.parity)),
            "latency_ms": {name: latency.to_json() for name, latency in times.items()} or None,
        }
        output.document(document("export", facts))
        return
    from prunekit.report.exporting import parity_line, side_by_side

    output.table(side_by_side(done, times, size), data=written is None)
    output.note(parity_line(done))
    if written not in (None, STREAM):
        output.data(str(written))


COMMAND = Command(
    run,
    (
        "prunekit export model.pt -o model.onnx",
        "prunekit export model.pt -o model.pt2 --fold-bn",
        "prunekit export small.pt -o small.onnx --data digits --opset 20",
        "prunekit export torchvision:resnet18 --format pt2 --fixed-batch 1",
        "prunekit export small.pt --format onnx -o - > small.onnx",
    ),
    {"file": "File", "where": "Output", "data": DATA, "check": "Comparison", "reading": READING},
)
