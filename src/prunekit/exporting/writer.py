"""Export to `.pt2` and ONNX, each file verified before it is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import nn

from prunekit.errors import InputError, PrunekitError, unknown_name
from prunekit.exporting import formats
from prunekit.exporting.interface import Example, arguments_of, how_to_call, named_inputs, named_outputs
from prunekit.exporting.parity import TOLERANCE, Batch, Parity, compare, require
from prunekit.exporting.runtimes import OnnxModel, stranger
from prunekit.files.writing import atomic_write, check_target
from prunekit.nn.buckets import NAME
from prunekit.nn.norms import drop_norms
from prunekit.programs.program import ExportedProgram
from prunekit.progress import counter
from prunekit.spec import origin_of
from prunekit.surgery import cost_of, trace
from prunekit.surgery.copying import copied
from prunekit.surgery.editing.batch_norm_folding import fold_batch_norms

Format = Literal["onnx", "pt2"]
FORMATS: tuple[Format, ...] = ("onnx", "pt2")


@dataclass(frozen=True)
class ExportOptions:
    """Options of a file, and how closely it must agree with its network.

    `opset` is ONNX's operator set (None: the exporter's own). `fixed_batch` fixes the batch size; None leaves it free.
    `tolerance` is the largest |difference of outputs|, relative to the largest |output| where that is above one;
    `min_agreement` is the least share of images that must get the same top class.
    """

    opset: int | None = None
    fixed_batch: int | None = None
    fold_bn: bool = False
    tolerance: float = TOLERANCE
    min_agreement: float = 1.0


@dataclass(frozen=True)
class Written:
    """A file's `content`, the names of its input and output tensors, and the batch norms folded into convolutions."""

    format: Format
    content: bytes = field(repr=False)
    folded: tuple[str, ...]
    opset: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return len(self.content)


@dataclass(frozen=True)
class Exported(Written):
    """A file and its comparison with the network."""

    parity: Parity


def export(
    model: nn.Module,
    target: str | Path | BinaryIO,
    x: Any,
    *,
    format: Format | None = None,
    options: ExportOptions | None = None,
    images: Iterable[Batch] | None = None,
    force: bool = False,
) -> Exported:
    """Write `model` to `target` in `format`, by default that of the suffix: `.onnx` or `.pt2`.

    The file is first run as its users will run it, ONNX by onnxruntime and `.pt2` in another process without prunekit
    and the model's code, and every output is compared; nothing is written where they differ.

    Args:
        model: The network; a copy is exported.
        target: A path or a binary stream.
        x: An example input `(N, ...)`, or a tuple of positional inputs; tensors in it may be nested in lists and dicts.
            The first dimension of all tensors with N entries is the batch.
        format: "onnx" or "pt2"; by default that of the suffix.
        options: See `ExportOptions`.
        images: Batches to compare outputs on; by default random inputs.
        force: Overwrite a file that exists.

    An output may be any container of tensors: in a `.pt2` it becomes one of tuples, lists and dicts, in ONNX its
    tensors are listed by their paths (`out`, `features.0`, `output_1`). Anything but a tensor is left out.

    Raises:
        InputError: The format is unknown, the target exists, the model does not accept the inputs, or a package is
            missing.
        SurgeryError: The model cannot be exported.
        CheckFailed: The file computes something else.
    """
    options = options or ExportOptions()
    if isinstance(target, str | Path):
        format = format or format_of(target)
        check_target(Path(target), force)
    if format not in FORMATS:
        raise unknown_name("format", str(format), FORMATS)
    done = exported(model, x, format, options, images)
    if isinstance(target, str | Path):
        atomic_write(target, lambda stream: stream.write(done.content), force=force)
    else:
        target.write(done.content)
    return done


def exported(
    model: nn.Module, x: Any, format: Format, options: ExportOptions, images: Iterable[Batch] | None = None
) -> Exported:
    """Return the verified content of a file; see `export`."""
    done = written(model, x, format, options)
    reference = copied(model).cpu().eval()
    with running(done.content, format, model) as runtime:
        batches = images if images is not None else random_batches(model, x, options.fixed_batch)
        parity = compare(reference, runtime, batches, options.fixed_batch, options.tolerance)
    require(parity, options.tolerance, options.min_agreement)
    return Exported(**vars(done), parity=parity)


def written(model: nn.Module, x: Any, format: Format, options: ExportOptions) -> Written:
    """Return the content of a file before any comparison."""
    counter("exporting")(0, 0)
    if isinstance(model, ExportedProgram) and model.batch not in (None, options.fixed_batch):
        raise InputError(f"this program takes batches of {model.batch} alone", hint=f"add --fixed-batch {model.batch}")
    example = Example.of(model, x)
    if options.fixed_batch and example.batch is None:
        raise InputError("--fixed-batch is for inputs with a batch, and a list of images (C, H, W) has none")
    size = options.fixed_batch or 2
    inputs = example.random(size, torch.Generator().manual_seed(0))
    plain, folded = _exportable(model, inputs, options)
    arguments, outputs = arguments_of(plain, inputs), _outputs(plain, inputs)
    names = (tuple(named_inputs(arguments, outputs)), outputs)
    free = None if options.fixed_batch else example.free(arguments, size, torch.export.Dim(formats.BATCH, min=1))
    about = formats.about(origin_of(model), macs=_macs(plain, inputs))
    if format == "onnx":
        content, opset = formats.to_onnx(plain, inputs, free, options.opset, about, names)
        return Written(format, content, folded, opset, *names)
    return Written(format, formats.to_pt2(plain, inputs, free, about), folded, None, *names)


def format_of(path: str | Path) -> Format:
    """Return the format that a file's suffix asks for.

    Raises:
        InputError: The suffix stands for none.
    """
    suffix = Path(path).suffix.lower()
    found = next((name for name in FORMATS if suffix == f".{name}"), None)
    if found is None:
        known = " and ".join(f".{name}" for name in FORMATS)
        raise InputError(f"{Path(path).name} has the suffix '{suffix}'", hint=f"known are {known}")
    return found


def _exportable(model: nn.Module, inputs: tuple[Any, ...], options: ExportOptions) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a plain copy for inference on the CPU, and the names of the batch norms that were folded."""
    plain = copied(model).cpu().eval()
    if hasattr(plain, NAME):  # the table of a gated network's sub-networks, which its own forward does not read
        delattr(plain, NAME)
    drop_norms(plain)
    return fold_batch_norms(plain, trace(plain, inputs, probe=False)) if options.fold_bn else (plain, ())


def _macs(model: nn.Module, inputs: tuple[Any, ...]) -> int | None:
    """Return the MACs of one input; None where the network can be exported and not traced."""
    try:
        return cost_of(model, trace(model, inputs, probe=False)).macs
    except PrunekitError:
        return None


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names of the network's outputs.

    Raises:
        InputError: It does not run on these inputs, or returns no tensor.
    """
    subject = copied(model)  # sizes that a forward caches must not become those of every input
    try:
        with torch.no_grad():
            output = subject(*inputs)
    except Exception as error:  # a stranger's forward may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"the model's forward fails on inputs like the example: {reason}",
            hint=how_to_call(model),
        ) from error
    return tuple(named_outputs(output))


def random_batches(model: nn.Module, x: Any, fixed_batch: int | None) -> Iterator[Batch]:
    """Yield random inputs shaped like `x`, also in other batch sizes than the one used for the export."""
    example, generator = Example.of(model, x), torch.Generator().manual_seed(1)
    sizes = [fixed_batch or 1] * 8 if fixed_batch or example.batch is None else [1, 21, 21, 21]
    for number, size in enumerate(sizes):
        yield example.random(size, generator, shuffled=number > 0), None


@contextlib.contextmanager
def running(content: bytes, format: Format, model: nn.Module) -> Iterator[nn.Module]:
    """Yield the file of `model` in the runtime of its users, and close that afterwards."""
    if format == "onnx":
        yield OnnxModel(content)
        return
    with stranger(content, _package_of(model)) as runtime:
        yield runtime


def _package_of(model: nn.Module) -> list[str]:
    """Return the package that the model's code is imported from, where it is a user's own."""
    origin = origin_of(model)
    module, _, function = (origin.arch if origin else "").partition(":")
    package = module.partition(".")[0]
    return [package] if function and package.isidentifier() and package != "torchvision" else []
