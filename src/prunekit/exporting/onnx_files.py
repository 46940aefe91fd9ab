"""Read an ONNX file in order to measure it: its classifier in onnxruntime, what it reads, and how large it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import InputError, SurgeryError
from prunekit.exporting.formats import ABOUT
from prunekit.exporting.runtimes import ExportedClassifier, OnnxModel
from prunekit.spec import InputSpec, Origin, remember

_KINDS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}
_NO_WEIGHTS = ("INT64", "BOOL", "STRING")  # types of shapes, indices and names
_NEXT_FIELDS = b"\x12\x1a\x22\x3a\x42"  # tags that follow the version at the beginning of a file


class OnnxClassifier(ExportedClassifier):
    """The classifier in an ONNX file, for any number of images also where the file takes one alone.

    `params` counts the numbers in its initialisers, without the running statistics of batch norms; `macs` are those
    that its exporter noted.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        session: OnnxModel,
        kind: torch.dtype,
        shape: tuple[int | None, ...],
        params: int,
        macs: int | None,
        size: int,
    ) -> None:
        super().__init__()
        self.session, self.kind, self.params, self.macs = session, kind, params, macs
        self.batch, self.sizes, self.size = shape[0], shape[1:], size

    def forward(self, images: Tensor) -> Tensor:
        """Return the output called `logits`, or else the first.

        Raises:
            InputError: The file does not run on such images.
        """
        images = images.to(self.kind)
        if self.batch is None:
            return self._run(images)
        parts = [self._run(_filled(part, self.batch))[: len(part)] for part in torch.split(images, self.batch)]
        return torch.cat(parts)

    def _run(self, images: Tensor) -> Tensor:
        try:
            output = self.session(images)
        except SurgeryError as error:
            raise InputError(error.message, hint="does --input-size give the size that it was made for?") from error
        found: Tensor = output if isinstance(output, Tensor) else output.get("logits", next(iter(output.values())))
        return found


def is_onnx(head: bytes) -> bool:
    """Return whether a file that begins so is an ONNX file."""
    return head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] != b"" and head[2:3] in _NEXT_FIELDS


def read_onnx(path: str) -> OnnxClassifier:
    """Return the classifier in a file; its origin has the input and the classes that the exporter noted.

    Where the normalisation of images is not noted, it counts as assumed.

    Raises:
        InputError: The file is damaged, needs a package that is missing, or takes anything but one batch of images.
    """
    session = OnnxModel(path)
    proto = _proto(path)
    if len(session.inputs) != 1:
        raise InputError(
            f"{path} takes {len(session.inputs)} inputs ({', '.join(session.inputs)}), expected one: a batch of images"
        )
    kind, shape = session.signature()
    if kind not in _KINDS or not shape:
        raise InputError(f"{path} reads {kind}, expected images in floating point, normalised", hint="export it so")
    about = _about(path, session.notes(ABOUT))
    fixed = tuple(size if isinstance(size, int) else None for size in shape)
    try:
        spec = InputSpec.from_json(about["input"]) if about.get("input") else _spec(fixed[1:])
        classes, macs = tuple(map(str, about.get("classes", ()))), about.get("macs")
        if macs is not None and (type(macs) is not int or macs < 0):
            raise ValueError(f"{macs!r} is no number of MACs")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: what it says about its input is not readable: {error}") from error
    model = OnnxClassifier(session, _KINDS[kind], fixed, _params(proto), macs, Path(path).stat().st_size)
    remember(model, Origin("", input=spec, classes=classes))
    return model.eval()


def check_size(model: ExportedClassifier, path: str, shape: tuple[int, ...]) -> None:
    """Raise `InputError` where a file takes other images than `shape`, `(C, H, W)`."""
    wanted = model.sizes
    if len(wanted) != len(shape) or any(want not in (None, size) for want, size in zip(wanted, shape, strict=True)):
        taken = "x".join("?" if size is None else str(size) for size in wanted)
        raise InputError(f"{path} takes images of {taken}, not of {'x'.join(map(str, shape))}")


def _spec(sizes: tuple[int | None, ...]) -> InputSpec | None:
    known = tuple(size for size in sizes if size is not None)
    return InputSpec(known, assumed=True) if known and len(known) == len(sizes) else None


def _about(path: str, notes: str | None) -> dict[str, Any]:
    try:
        found = json.loads(notes) if notes else {}
    except ValueError as error:
        raise InputError(f"{path} is damaged: its notes are not readable: {error}") from error
    return found if isinstance(found, dict) else {}


def _proto(path: str) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise InputError("reading ONNX files needs onnx", hint="pip install 'prunekit[onnx]'") from error
    try:
        return onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors
        raise InputError(f"{path} is a damaged ONNX file: {str(error)[:200]}") from error


def _params(proto: Any) -> int:
    from onnx import TensorProto

    statistics = {name for node in proto.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]}
    left_out = {getattr(TensorProto, kind) for kind in _NO_WEIGHTS}
    return sum(
        math.prod(one.dims)
        for one in proto.graph.initializer
        if one.name not in statistics and one.data_type not in left_out
    )


def _filled(images: Tensor, size: int) -> Tensor:
    """Return a batch of `size` images: the last one is repeated where there are fewer."""
    missing = size - len(images)
    return images if missing <= 0 else torch.cat([images, images[-1:].expand(missing, *images.shape[1:])])


def looks_like_onnx(source: str) -> bool:
    """Return whether `source` is a file that begins as ONNX files do, or is called `.onnx`."""
    path = Path(source)
    if not path.is_file():
        return False
    if path.suffix.lower() == ".onnx":
        return True
    with path.open("rb") as stream:
        return is_onnx(stream.read(3))
