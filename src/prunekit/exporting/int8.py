"""Post-training static quantisation of an ONNX file, by onnxruntime's own quantiser, with the loss measured.

Weights become int8, with a scale for each output channel, activations uint8, with scales from calibration images (Jacob
et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018). The
file has pairs of QuantizeLinear and DequantizeLinear ("QDQ"), which runtimes turn into int8 kernels. Layers whose
rounding costs most are left in float until the accuracy asked for is kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunekit.errors import CheckFailed, InputError
from prunekit.exporting.runtimes import OnnxModel
from prunekit.exporting.silence import silenced
from prunekit.progress import counter

METHODS = ("percentile", "entropy", "minmax")
FEWEST = 32  # calibration images: fewer leave the ranges of activations to chance
_BATCH = 16
_LAYERS = ("Conv", "Gemm", "MatMul", "ConvTranspose")
_FLOAT = "_float"
_COMPARED = 64  # images on which a layer's share in the error is measured
_INT8 = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger")


@dataclass(frozen=True)
class Quantised:
    """An int8 file.

    Attributes:
        content: The file.
        layers: How many convolutions and linear layers it has.
        left: The names of those that stayed in float.
        accuracy: Share of the validation images, 0 to 1, that the float file gets right.
        int8_accuracy: That of this file.
        agreement: Share of them with the same top class in both.
        images: How many these are.
        kernels: Whether this machine's runtime has int8 kernels for it; without, it computes in float, more slowly.
    """

    content: bytes = field(repr=False)
    layers: int
    left: tuple[str, ...]
    accuracy: float
    int8_accuracy: float
    agreement: float
    images: int
    kernels: bool

    @property
    def drop(self) -> float:
        """The accuracy lost, 0 to 1; less than zero where some was gained."""
        return self.accuracy - self.int8_accuracy

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**{name: value for name, value in vars(self).items() if name != "content"}, "left": list(self.left)}


@dataclass(frozen=True)
class Int8Score:
    """Shares, 0 to 1, of `images`: those that the int8 file gets right, and those with the class of the float file."""

    accuracy: float
    agreement: float
    images: int


def quantised(
    content: bytes,
    calibration: Tensor,
    validation: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    *,
    max_drop: float,
    method: str = METHODS[0],
) -> Quantised:
    """Return an int8 form of an ONNX file that loses at most `max_drop` of its accuracy.

    Args:
        content: The file of a classifier of images, in float32.
        calibration: Normalised images `(N, C, H, W)` that ranges are measured on.
        validation: Yields batches of normalised images and labels that the loss is measured on, each time anew.
        max_drop: Share of accuracy that may go, 0 to 1.
        method: How ranges are found: `percentile` (99.999 %), `entropy` (least Kullback-Leibler divergence) or
            `minmax`.

    Raises:
        InputError: Too few images, no layer that could be quantised, or a package is missing.
        CheckFailed: More is lost even with all but one layer in float.
    """
    if len(calibration) < FEWEST:
        raise InputError(
            f"{len(calibration)} calibration images are too few for int8", hint=f"at least {FEWEST}; 500 are plenty"
        )
    plain, whole = _quantised(content, calibration, method)
    layers = _layers(plain)
    if not layers:
        raise InputError("the file has no convolution or linear layer that could become int8")
    wanted, order = _Answers(content, validation), list[str]()
    left: Sequence[str] = ()
    while True:
        made = _with_float(whole, plain, left)
        found = _Answers(made, validation)
        if wanted.accuracy - found.accuracy <= max_drop:
            agreement = float((found.classes == wanted.classes).mean())
            facts = (wanted.accuracy, found.accuracy, agreement, len(found.classes), _has_kernels(made))
            return Quantised(made, len(layers), tuple(left), *facts)
        if len(left) >= len(layers) - 1:
            raise CheckFailed(
                f"int8 loses {wanted.accuracy - found.accuracy:.2%} even with all layers but one in float, "
                f"and {max_drop:.2%} may go; nothing was written",
                hint="--calibrate entropy, more images, or a larger --max-drop",
            )
        order = order or _by_error(plain, whole, layers, calibration[:_COMPARED])
        left = order[: min(len(layers) - 1, max(1, 2 * len(left)))]


def _quantised(content: bytes, calibration: Tensor, method: str) -> tuple[Any, Any]:
    """Return the file as the quantiser reads it, with batch norms folded, and its int8 form."""
    try:
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise InputError(f"int8 needs onnxruntime's quantiser: {error}", hint="pip install 'prunekit[onnx]'") from error
    kind = {"percentile": "Percentile", "entropy": "Entropy", "minmax": "MinMax"}[method]
    counter("calibrating int8")(0, 0)
    with tempfile.TemporaryDirectory(prefix="prunekit-") as folder, silenced():
        source, plain, target = (str(Path(folder) / name) for name in ("model.onnx", "plain.onnx", "int8.onnx"))
        Path(source).write_bytes(content)
        quant_pre_process(source, plain, skip_symbolic_shape=True)
        quantize_static(
            plain,
            target,
            _reader(OnnxModel(content).inputs[0], calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, kind),
            extra_options={"CalibStridedMinMax": 1},  # a batch at a time: all activations of all would be held
        )
        return onnx.load(plain), onnx.load(target)


def _reader(name: str, images: Tensor) -> Any:
    """Return what gives the quantiser the images, in batches; it may ask for a part of them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._parts = [part.contiguous().numpy() for part in torch.split(images, _BATCH)]
            self._left = iter(self._parts)

        def __len__(self) -> int:
            return len(self._parts)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._left = iter(self._parts[start_index:end_index])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            part = next(self._left, None)
            return None if part is None else {name: part}

    return Reader()


def _layers(plain: Any) -> list[str]:
    return [node.name for node in plain.graph.node if node.op_type in _LAYERS]


def _with_float(whole: Any, plain: Any, left: Sequence[str]) -> bytes:
    """Return the int8 file in which some layers read what they read in float: weights and activations unrounded."""
    if not left:
        content: bytes = whole.SerializeToString()
        return content
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(whole)
    origin = {node.name: node for node in plain.graph.node}
    weights = {one.name: one for one in plain.graph.initializer}
    again: set[str] = set()
    for node in made.graph.node:
        if node.name not in left:
            continue
        read = origin[node.name].input
        again |= {name for name in read if name in weights}
        del node.input[:]
        node.input.extend(f"{name}{_FLOAT}" if name in weights else name for name in read)
    for name in sorted(again):  # under names of their own: the quantiser gives theirs to what it makes of them
        one = made.graph.initializer.add()
        one.CopyFrom(weights[name])
        one.name = f"{name}{_FLOAT}"
    _without_unread(made)
    return bytes(made.SerializeToString())


def _without_unread(made: Any) -> None:
    """Remove nodes and weights that nothing reads any more."""
    while True:
        read = {name for node in made.graph.node for name in node.input} | {out.name for out in made.graph.output}
        idle = [node for node in made.graph.node if not read.intersection(node.output)]
        if not idle:
            break
        for node in idle:
            made.graph.node.remove(node)
    for one in [one for one in made.graph.initializer if one.name not in read]:
        made.graph.initializer.remove(one)


def _by_error(plain: Any, whole: Any, layers: Sequence[str], images: Tensor) -> list[str]:
    """Return the layers, first the one that brings the outputs closest to those in float when it alone is in float."""
    exact = _outputs(plain.SerializeToString(), images)
    errors, count = {}, counter("looking for sensitive layers")
    for number, name in enumerate(layers):
        count(number, len(layers))
        errors[name] = float((_outputs(_with_float(whole, plain, [name]), images) - exact).square().mean())
    return sorted(layers, key=lambda name: errors[name])


def _outputs(content: bytes, images: Tensor) -> Tensor:
    model = OnnxModel(content)
    return torch.cat([scores(model(part)) for part in torch.split(images, _BATCH)])


def scores(output: Any) -> Tensor:
    """Return the output called `logits`, or else the first."""
    found: Tensor = output if isinstance(output, Tensor) else output.get("logits", next(iter(output.values())))
    return found


class _Answers:
    """The classes that a file names, and the share that is right."""

    def __init__(self, content: bytes, validation: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> None:
        model, classes, right = OnnxModel(content), [], []
        for images, labels in validation():
            classes.append(scores(model(images)).argmax(1).numpy())
            right.append(classes[-1] == labels.numpy())
        self.classes: NDArray[np.int64] = np.concatenate(classes)
        self.accuracy = float(np.concatenate(right).mean())


def _has_kernels(content: bytes) -> bool:
    """Return whether the runtime computes a file in int8 here: it then has operators for it in its own form of it."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="prunekit-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "as-run.onnx")
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        run = onnx.load(options.optimized_model_filepath)
    return any(node.op_type in _INT8 for node in run.graph.node)
