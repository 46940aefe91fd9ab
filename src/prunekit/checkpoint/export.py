"""Files that need neither prunekit nor the model's code: `.pt2` and ONNX, each checked before it is kept."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor, nn

from prunekit.checkpoint import formats
from prunekit.checkpoint.runtimes import OnnxModel, stranger
from prunekit.checkpoint.write import atomic_write, check_target
from prunekit.errors import CheckFailed, InputError, unknown_name
from prunekit.spec import origin_of
from prunekit.surgery import trace
from prunekit.surgery.norms import fold_batch_norms

Format = Literal["onnx", "pt2"]
FORMATS: tuple[Format, ...] = ("onnx", "pt2")
TOLERANCE = 1e-4

Batch = tuple[Tensor, Tensor | None]
"""Images `(N, ...)`, normalised, and their labels `(N,)` where they are known."""


@dataclass(frozen=True)
class ExportOptions:
    """How a network is written, and how closely the file must agree with it.

    `opset` is ONNX's operator set (None: the exporter's own). `fixed_batch` allows that one batch size alone; None
    leaves it free. `tolerance` is the largest |difference of outputs|, relative to the largest |output| where that is
    above one; `min_agreement` the least share of images that must get the same top class.
    """

    opset: int | None = None
    fixed_batch: int | None = None
    fold_bn: bool = False
    tolerance: float = TOLERANCE
    min_agreement: float = 1.0


@dataclass(frozen=True)
class Parity:
    """How a file's outputs compare with the network's, over `images` inputs.

    `difference` is max |difference of outputs|, `scale` max |output| of the network, `agreement` the share of images
    with the same top class (None where the outputs are not `(N, classes)`). With labels, `accuracy` is the network's
    and `exported_accuracy` the file's; all shares are from 0 to 1.
    """

    difference: float
    scale: float
    agreement: float | None
    images: int
    accuracy: float | None = None
    exported_accuracy: float | None = None


@dataclass(frozen=True)
class Exported:
    """What was written: `content` is the whole file, `folded` the batch norms that are now part of convolutions."""

    format: Format
    content: bytes
    parity: Parity
    folded: tuple[str, ...]
    opset: int | None


def export(
    model: nn.Module,
    target: str | Path | BinaryIO,
    x: Tensor,
    *,
    format: Format | None = None,
    options: ExportOptions | None = None,
    images: Iterable[Batch] | None = None,
    force: bool = False,
) -> Exported:
    """Write `model` to `target` in `format`, by default that of the suffix: `.onnx` or `.pt2`.

    `x` is an example input `(N, ...)`. Before anything is written the file is run as its users will run it, ONNX by
    onnxruntime and `.pt2` in another process without prunekit and the model's code, on `images`, or else on random
    inputs.

    Raises:
        InputError: an unknown format, a target that exists, or a package that is missing.
        SurgeryError: the model cannot be exported.
        CheckFailed: the file computes something else. Nothing is written.
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
    model: nn.Module, x: Tensor, format: Format, options: ExportOptions, images: Iterable[Batch] | None = None
) -> Exported:
    """The file's content, checked; see `export`."""
    plain, example, folded = _exportable(model, x, options)
    about = formats.about(origin_of(model))
    if format == "onnx":
        content, opset = formats.to_onnx(plain, example, options.fixed_batch, options.opset, about)
    else:
        content, opset = formats.to_pt2(plain, example, options.fixed_batch, about), None
    reference = copy.deepcopy(model).cpu().eval()
    batches = images if images is not None else _random(example, options.fixed_batch)
    with _running(content, format, model) as runtime:
        parity = compare(reference, runtime, batches, options.fixed_batch)
    _require(parity, options)
    return Exported(format, content, parity, folded, opset)


def format_of(path: str | Path) -> Format:
    """The format that a file's suffix asks for.

    Raises:
        InputError: it asks for none.
    """
    suffix = Path(path).suffix.lower()
    found = next((name for name in FORMATS if suffix == f".{name}"), None)
    if found is None:
        known = " and ".join(f".{name}" for name in FORMATS)
        raise InputError(f"{Path(path).name} has the suffix '{suffix}'", hint=f"known are {known}")
    return found


def compare(model: nn.Module, runtime: nn.Module, batches: Iterable[Batch], fixed_batch: int | None = None) -> Parity:
    """Run both on the same inputs, in batches of `fixed_batch` where the file takes no other size."""
    tally = _Tally()
    with torch.inference_mode():
        for images, labels in _sized(batches, fixed_batch):
            tally.add(model(images), runtime(images), labels)
    return tally.parity()


class _Tally:
    """What has been compared so far."""

    def __init__(self) -> None:
        self.difference = self.scale = 0.0
        self.seen = self.same = self.labelled = self.right = self.exported_right = 0
        self.classifies = True

    def add(self, wanted: Tensor, found: Tensor, labels: Tensor | None) -> None:
        """One batch of outputs, `wanted` from the network and `found` from the file."""
        if wanted.shape != found.shape:
            shapes = f"{tuple(found.shape)} instead of {tuple(wanted.shape)}"
            raise CheckFailed(f"the exported network gives outputs of shape {shapes}; nothing was written")
        # a comparison with NaN is never true: let it show as an infinite difference
        gap = float((wanted.double() - found.double()).abs().max())
        self.difference = max(self.difference, gap if math.isfinite(gap) else math.inf)
        self.scale = max(self.scale, float(wanted.abs().max()))
        self.seen += len(wanted)
        self.classifies = self.classifies and wanted.dim() == 2
        if self.classifies:
            first, second = wanted.argmax(1), found.argmax(1)
            self.same += int((first == second).sum())
            if labels is not None:
                self.labelled += len(labels)
                self.right += int((first == labels).sum())
                self.exported_right += int((second == labels).sum())

    def parity(self) -> Parity:
        """The comparison as a whole."""
        if not self.seen:
            raise InputError("there are no images to compare the exported network on")
        labelled = self.labelled == self.seen
        return Parity(
            difference=self.difference,
            scale=self.scale,
            agreement=self.same / self.seen if self.classifies else None,
            images=self.seen,
            accuracy=self.right / self.seen if labelled else None,
            exported_accuracy=self.exported_right / self.seen if labelled else None,
        )


def _exportable(model: nn.Module, x: Tensor, options: ExportOptions) -> tuple[nn.Module, Tensor, tuple[str, ...]]:
    """A plain copy for inference on the CPU, an example input for it, and the batch norms that were folded."""
    plain = copy.deepcopy(model).cpu().eval()
    kind = next((p.dtype for p in plain.parameters() if p.is_floating_point()), torch.float32)
    size = (options.fixed_batch or 2, *x.shape[1:])
    example = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(kind)
    if not options.fold_bn:
        return plain, example, ()
    small, folded = fold_batch_norms(plain, trace(plain, example, probe=False))
    return small, example, folded


def _random(example: Tensor, fixed_batch: int | None) -> Iterator[Batch]:
    """Random inputs, in batches of other sizes than the one that the network was exported with."""
    generator = torch.Generator().manual_seed(1)
    for size in [fixed_batch] * 8 if fixed_batch else [1, 21, 21, 21]:
        yield torch.randn((size, *example.shape[1:]), generator=generator).to(example), None


def _sized(batches: Iterable[Batch], size: int | None) -> Iterator[Batch]:
    """The same images in batches of the one `size` that the file takes; a rest that fills none is left out."""
    if size is None:
        yield from batches
        return
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch, named in batches:
        images += batch.unbind()
        labels += named.unbind() if named is not None else []
        while len(images) >= size:
            yield torch.stack(images[:size]), torch.stack(labels[:size]) if labels else None
            del images[:size], labels[:size]


@contextlib.contextmanager
def _running(content: bytes, format: Format, model: nn.Module) -> Iterator[nn.Module]:
    if format == "onnx":
        yield OnnxModel(content)
        return
    with stranger(content, _package_of(model)) as runtime:
        yield runtime


def _package_of(model: nn.Module) -> list[str]:
    """The package that the model's code is imported from, where it is a user's own."""
    origin = origin_of(model)
    module, _, function = (origin.arch if origin else "").partition(":")
    package = module.partition(".")[0]
    return [package] if function and package.isidentifier() and package != "torchvision" else []


def _require(parity: Parity, options: ExportOptions) -> None:
    allowed = options.tolerance * max(1.0, parity.scale)
    if not parity.difference <= allowed:
        raise CheckFailed(
            f"the exported network's outputs differ from the model's by {parity.difference:.1e}, and {allowed:.1e} is "
            "allowed; nothing was written",
            hint="a larger --tolerance allows more",
        )
    if parity.agreement is not None and parity.agreement < options.min_agreement:
        raise CheckFailed(
            f"the exported network names {1 - parity.agreement:.2%} of {parity.images} images otherwise; nothing was "
            "written",
            hint="--min-agreement 0.999 allows a thousandth, where two classes are as good as tied",
        )
