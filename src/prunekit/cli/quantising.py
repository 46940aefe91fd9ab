"""`export --int8`: its options, its images, and what it came to on images that nothing was chosen by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from prunekit.cli.framework.options import DataOptions, ReadingOptions, option
from prunekit.cli.models import spec_of
from prunekit.errors import InputError
from prunekit.report.terminal.output import Output
from prunekit.workflows.goals import DropGoal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunekit.cli.framework.options import Split
    from prunekit.exporting.int8 import Int8Score, Quantised

_BATCH_SIZE = 256


@dataclass(frozen=True)
class Int8Options:
    """Integers in the place of floating-point numbers."""

    int8: bool = option(
        False,
        help="Quantise the ONNX file: weights and activations in 8 bits, their ranges measured on training images.",
    )
    max_drop: str = option(
        "0.5%", metavar="POINTS", help="Accuracy that int8 may lose on validation images; layers stay in float for it."
    )
    calibrate: str = option(
        "percentile", choices=("percentile", "entropy", "minmax"), help="How the ranges of activations are found."
    )
    calibration: int = option(500, metavar="COUNT", help="Training images to find them on, without labels.")

    def check(self, data: DataOptions, format: str, *, buckets: bool, fixed_batch: int | None) -> None:
        """Raise `InputError` for what does not go with int8."""
        if not self.int8:
            return
        if data.data is None:
            raise InputError("--int8 needs images", hint="say which with --data")
        others = {"--buckets": buckets, f"a .{format}": format != "onnx", "--fixed-batch": fixed_batch}
        for other, given in others.items():
            if given:
                raise InputError(f"--int8 is for ONNX files that take any batch, not for {other}")
        if self.calibration < 1:
            raise InputError(f"--calibration must be at least 1, found {self.calibration}")
        _ = self.drop

    @property
    def drop(self) -> float:
        """The accuracy that may be lost, 0 to 1."""
        return DropGoal.parse(self.max_drop).drop


def quantise(
    output: Output, network: nn.Module, content: bytes, options: Int8Options, data: DataOptions, reading: ReadingOptions
) -> Quantised:
    """Return the int8 form of a file of a network: calibrated on training images, judged on validation images.

    Raises:
        InputError: There are too few images, or they are not labelled for this network.
        CheckFailed: It loses more than may go.
    """
    from prunekit.data import labelled_for
    from prunekit.exporting.int8 import quantised

    train_set = data.images(output, "train", spec_of(network), reading, lazy=True)
    val_set = labelled_for(network, data.images(output, "val", spec_of(network), reading))
    images = train_set.sample(options.calibration).inputs()
    found = quantised(
        content,
        images,
        lambda: val_set.batches(_BATCH_SIZE),
        max_drop=options.drop,
        method=options.calibrate,
    )
    if not found.kernels:
        output.warn("onnxruntime has no int8 kernels on this machine: the file is computed in float here, and slower")
    left = f"; {len(found.left)} of {found.layers} layers stay in float: {', '.join(found.left)}" if found.left else ""
    output.note(
        f"int8 loses {100 * found.drop:.2f} points on {found.images:,} validation images, "
        f"{found.agreement:.2%} of the classes are the same{left}"
    )
    return found


def scored(
    output: Output,
    network: nn.Module,
    files: tuple[bytes, bytes],
    split: str,
    data: DataOptions,
    reading: ReadingOptions,
) -> Int8Score:
    """Return how the second of two files, in int8, does on the images that are reported on."""
    import torch

    from prunekit.data import labelled_for
    from prunekit.exporting.int8 import Int8Score, scores
    from prunekit.exporting.runtimes import OnnxModel

    images = labelled_for(network, data.images(output, cast("Split", split), spec_of(network), reading))
    exact, small = (OnnxModel(content) for content in files)
    right: list[Tensor] = []
    same: list[Tensor] = []
    for batch, labels in images.batches(_BATCH_SIZE):
        answers = scores(small(batch)).argmax(1)
        right.append(answers == labels)
        same.append(answers == scores(exact(batch)).argmax(1))
    share, agreeing = (float(torch.cat(parts).float().mean()) for parts in (right, same))
    return Int8Score(share, agreeing, len(images))


def facts_of(small: Quantised, score: Int8Score) -> dict[str, Any]:
    """Return the facts of an int8 file for programs."""
    return {"validation": small.to_json(), **asdict(score), "bytes": len(small.content)}
