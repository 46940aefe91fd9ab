"""`prunekit export`: a file that needs neither prunekit nor the model's code, verified against the model."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import (
    DATA,
    READING,
    DataOptions,
    ModelArgument,
    OutputOptions,
    ReadingOptions,
    option,
)
from prunekit.cli.inputs import example_inputs
from prunekit.cli.models import STREAM, check_inputs, output_path, read_model, spec_of
from prunekit.cli.quantising import Int8Options, facts_of, quantise, scored
from prunekit.errors import InputError
from prunekit.progress import counter
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunekit.cli.framework.options import Split
    from prunekit.data import ImageSet
    from prunekit.evaluation.latency import Latency
    from prunekit.exporting.int8 import Int8Score, Quantised
    from prunekit.exporting.parity import Batch
    from prunekit.exporting.writer import Exported, ExportOptions, Format
    from prunekit.methods.manidp.runtimes.files import ExportedBuckets

    Small = tuple[Quantised, Int8Score]

_BATCH_SIZE = 256


@dataclass(frozen=True)
class FileOptions:
    """Kind of file."""

    format: str | None = option(
        choices=("onnx", "pt2"),
        help="onnx, or pt2 (torch.export); by default what the output's suffix says, else onnx.",
    )
    opset: int | None = option(
        metavar="VERSION", help="ONNX's operator set, 18 or later; by default the exporter's own."
    )
    inputs: str | None = option(
        metavar="SIZE,...",
        help="Inputs of a model that takes more than one image, in order and without the batch: "
        "3x64x64,6 or 3x64x64,16:int64.",
    )
    fixed_batch: int | None = option(help="Allow this one batch size; without it any size will do.")
    fold_bn: bool = option(False, help="Make batch norms part of the convolutions in front of them.")
    budget: str | None = option(metavar="NAME", help="Thresholds of gates, stored by manidp calibrate under this name.")
    buckets: bool = option(
        False, help="Write the static sub-networks of a network with gates and their router, into a folder."
    )


@dataclass(frozen=True)
class CheckOptions:
    """Comparison of the file with the model."""

    split: str = option("test", choices=("test", "val", "train"), help="Split of the data set.")
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
    int8: Int8Options,
    reading: ReadingOptions,
) -> None:
    """Export, compare, write, and show both side by side."""
    _check(file, where, data, check)
    check_inputs(model, data, reading)
    from prunekit.exporting.writer import ExportOptions

    format = _format(file, where)
    int8.check(data, format, buckets=file.buckets, fixed_batch=file.fixed_batch)
    target = _target(model, file, where, format, output)
    network, size = read_model(model, reading)
    _use_gates(network, file)
    example = example_inputs(network, file.inputs)
    options = ExportOptions(file.opset, file.fixed_batch, file.fold_bn, check.tolerance, check.min_agreement)
    batches = None
    if data.given:
        images = data.images(output, cast("Split", check.split), spec_of(network), reading)
        batches = _batches(network, example, images, output)
    done = _exported(network, example, format, options, batches, buckets=file.buckets)
    small = _smaller(output, network, done, int8, check, data, reading) if int8.int8 else None
    times = _latencies(network, example, done, file.fixed_batch or 1, check, small) if check.latency else {}
    written = None if where.dry_run else _write(done, target, output, small, force=where.force)
    _report(output, written, done, times, size, small)


def _check(file: FileOptions, where: OutputOptions, data: DataOptions, check: CheckOptions) -> None:
    for name, value in (("opset", file.opset), ("fixed-batch", file.fixed_batch), ("threads", check.threads)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, found {value}")
    if not check.tolerance > 0:
        raise InputError(f"--tolerance must be positive, found {check.tolerance:g}")
    if not 0 <= check.min_agreement <= 1:
        raise InputError(f"--min-agreement {check.min_agreement:g} is not a share", hint="99.9 % is 0.999")
    if file.inputs is not None and data.given:
        raise InputError("--inputs and --data disagree: data is one image", hint="without --data, inputs are random")
    if file.inputs is not None and file.buckets:
        raise InputError("--inputs is not for --buckets: networks with gates take one image")
    if file.buckets and file.budget is not None:
        raise InputError("--budget and --buckets disagree: sub-networks keep the channels that they were cut with")
    if file.buckets and file.fold_bn:
        raise InputError("--fold-bn is not for --buckets: sub-networks have no batch norms that could be folded")
    if file.buckets and where.out == STREAM:
        raise InputError("--buckets writes several files", hint="name a folder with -o FOLDER")


def _format(file: FileOptions, where: OutputOptions) -> Format:
    """Return the format of --format, else of the suffix of --output, else ONNX."""
    from prunekit.exporting.writer import format_of

    named = format_of(where.out) if where.out not in (None, STREAM) and not file.buckets else None
    asked = cast("Format | None", file.format)
    if asked and named and asked != named:
        raise InputError(f"--format {asked} and --output {where.out} disagree", hint="one of them is enough")
    format = asked or named or "onnx"
    if file.opset is not None and format != "onnx":
        raise InputError("--opset is ONNX's: a .pt2 file has none")
    return format


def _target(model: str, file: FileOptions, where: OutputOptions, format: Format, output: Output) -> str:
    """Return the file to write, or with --buckets the folder, checked before any work."""
    if not file.buckets:
        return output_path(model, where, "", output, kind=f".{format}")
    from prunekit.files.writing import check_folder
    from prunekit.methods.manidp.runtimes.files import OURS

    target = output_path(model, dataclasses.replace(where, dry_run=True), "buckets", output, kind="")
    if not where.dry_run:
        check_folder(Path(target), OURS if where.force else None)
    return target


def _use_gates(network: nn.Module, file: FileOptions) -> None:
    """Set the thresholds of --budget; raise `InputError` for flags of gates without gates."""
    from prunekit.methods.manidp.budgets import use_budget
    from prunekit.nn.gated import gated_layers

    if (file.buckets or file.budget is not None) and not any(gated_layers(network)):
        flag = "--buckets" if file.buckets else "--budget"
        raise InputError(f"{flag} is for networks with gates", hint="prunekit manidp train makes them")
    if file.budget is not None:
        use_budget(network, file.budget)


def _exported(
    network: nn.Module,
    example: tuple[Tensor, ...],
    format: Format,
    options: ExportOptions,
    batches: Iterator[Batch] | None,
    *,
    buckets: bool,
) -> Exported | ExportedBuckets:
    from prunekit.exporting.writer import exported
    from prunekit.methods.manidp.runtimes.files import export_buckets

    if buckets:
        return export_buckets(network, format, options, batches)
    return exported(network, example, format, options, batches)


def _batches(network: nn.Module, example: tuple[Tensor, ...], images: ImageSet, output: Output) -> Iterator[Batch]:
    """Yield all images in batches, with the progress shown; with labels where they are those of the network."""
    seen, labelled = 0, True
    try:
        images = _labelled(network, example, images)
    except InputError as error:
        labelled = False
        output.warn(f"{error.message}: outputs are compared, and no accuracies ({error.hint})")
    count = counter("comparing outputs")
    for batch, labels in images.batches(_BATCH_SIZE):
        yield batch, labels if labelled else None
        seen += len(labels)
        count(seen, len(images))


def _labelled(network: nn.Module, example: tuple[Tensor, ...], images: ImageSet) -> ImageSet:
    """Return images whose labels number the outputs of a classifier; raise `InputError` where they cannot."""
    import torch

    from prunekit.data import check_classes, labelled_for
    from prunekit.spec import classes_of

    images = labelled_for(network, images)
    with torch.inference_mode():
        scores = network(*example)
    if isinstance(scores, torch.Tensor) and scores.dim() == 2:
        check_classes(scores.shape[1], images, classes_of(network))
    return images


def _latencies(
    network: nn.Module,
    example: tuple[Tensor, ...],
    done: Exported | ExportedBuckets,
    batch: int,
    check: CheckOptions,
    small: Small | None,
) -> dict[str, Latency]:
    """Return the latencies of the model in PyTorch and of the file in its runtime, with the same number of threads."""
    from prunekit.evaluation.latency import measure_latency, threads_limited
    from prunekit.methods.manidp.runtimes.buckets import Bucketed, bucketed
    from prunekit.methods.manidp.runtimes.files import ExportedBuckets

    networks: dict[str, nn.Module]
    with threads_limited(check.threads):
        if isinstance(done, ExportedBuckets):
            router, *parts = [_runtime(done.format, content) for content in done.networks]
            networks = {"model": bucketed(network), "exported": Bucketed(router, parts)}
        else:
            networks = {"model": network, "exported": _runtime(done.format, done.content)}
            networks |= {"int8": _runtime(done.format, small[0].content)} if small else {}
        return {name: measure_latency(one, example, batch=batch) for name, one in networks.items()}


def _smaller(
    output: Output,
    network: nn.Module,
    done: Exported | ExportedBuckets,
    options: Int8Options,
    check: CheckOptions,
    data: DataOptions,
    reading: ReadingOptions,
) -> Small:
    """Return the int8 form of the file, and how it does on the images that are reported on."""
    content = done.content  # type: ignore[union-attr]  # not sub-networks: they do not go with int8
    small = quantise(output, network, content, options, data, reading)
    return small, scored(output, network, (content, small.content), check.split, data, reading)


def _runtime(format: Format, content: bytes) -> nn.Module:
    """Return a file in its runtime, in this process."""
    import torch

    from prunekit.exporting.runtimes import OnnxModel

    return OnnxModel(content) if format == "onnx" else torch.export.load(io.BytesIO(content)).module()


def _write(done: Exported | ExportedBuckets, target: str, output: Output, small: Small | None, *, force: bool) -> str:
    from prunekit import checkpoint
    from prunekit.methods.manidp.runtimes.files import ExportedBuckets, write_buckets

    if isinstance(done, ExportedBuckets):
        write_buckets(done, target, force=force)
        return target
    content = small[0].content if small else done.content
    if target == STREAM:
        output.binary(content)
    else:
        checkpoint.atomic_write(Path(target), lambda stream: stream.write(content), force=force)
    return target


def _report(
    output: Output,
    written: str | None,
    done: Exported | ExportedBuckets,
    times: dict[str, Latency],
    size: int | None,
    small: Small | None,
) -> None:
    if output.json:
        facts: dict[str, Any] = {
            "output": written,
            "format": done.format,
            "opset": done.opset,
            "bytes": done.size,
            **({} if small is None else {"int8": facts_of(*small)}),
            "files": list(getattr(done, "files", ())),
            "folded": list(done.folded),
            "inputs": list(done.inputs),
            "outputs": list(done.outputs),
            "parity": done.parity.to_json(),
            "latency_ms": {name: latency.to_json() for name, latency in times.items()} or None,
        }
        output.document(document("export", facts))
        return
    from prunekit.report.terminal.exporting import parity_line, side_by_side

    output.table(side_by_side(done, times, size, small), data=written is None)
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
        "prunekit export two_inputs.pt -o two.onnx --arch net.py:TwoInputs --inputs 3x64x64,6",
        "prunekit export small.pt --format onnx -o - > small.onnx",
        "prunekit export small.pt -o small-int8.onnx --int8 --data path/to/images --max-drop 0.5%",
        "prunekit export gated.pt -o gated.onnx --budget 50%",
        "prunekit export gated.pt --buckets -o folder --data digits",
    ),
    {"file": "File", "where": "Output", "data": DATA, "check": "Comparison", "int8": "Int8", "reading": READING},
)
