"""Files that need neither prunekit nor the model's code: `.pt2` and ONNX, each checked before it is kept."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checkpoint.write import atomic_write
from prunekit.errors import InputError, SurgeryError

TOLERANCE = 1e-4  # largest difference of outputs, relative to their size


def export(model: nn.Module, target: str | Path, x: Tensor, *, force: bool = False) -> float:
    """Write `model` to `target`, `.pt2` or `.onnx` by its suffix, and return the largest relative difference.

    `x` is an example input `(N, ...)`; the batch size stays free. What was written is run on two random inputs, by
    `torch.export` or by onnxruntime where it is installed, and must give the model's outputs to 1e-4; NaN is returned
    where there is no onnxruntime to ask.

    Raises:
        InputError: an unknown suffix, a target that exists, or a package that is missing.
        SurgeryError: the model cannot be exported, or the file computes something else. Nothing is written then.
    """
    path = Path(target)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise InputError(f"{path.name} has the suffix '{path.suffix}'", hint=f"known are {' and '.join(_WRITERS)}")
    plain = copy.deepcopy(model).eval()
    example = torch.randn((2, *x.shape[1:]), generator=torch.Generator().manual_seed(0)).to(next(plain.parameters()))
    content, run = writer(plain, example)
    with torch.no_grad():
        difference = _difference(plain(example), run)
    if difference > TOLERANCE:
        raise SurgeryError(f"the exported network differs from the model by {difference:.1e}; nothing was written")
    atomic_write(path, lambda stream: stream.write(content), force=force)
    return difference


def _difference(wanted: Tensor, run: Callable[[], Tensor | None]) -> float:
    found = run()
    if found is None:
        return float("nan")
    return float((wanted.cpu() - found.cpu()).abs().max() / wanted.abs().max().clamp_min(1e-30).cpu())


def _program(model: nn.Module, example: Tensor) -> Any:
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # what torch.export raises is of many kinds, and says why
        raise SurgeryError(f"the model cannot be exported: {' '.join(str(error).split())[:200]}") from error


def _to_pt2(model: nn.Module, example: Tensor) -> tuple[bytes, Callable[[], Tensor | None]]:
    buffer = io.BytesIO()
    torch.export.save(_program(model, example), buffer)
    content = buffer.getvalue()

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = torch.export.load(io.BytesIO(content)).module()(example)
        return result

    return content, run


def _to_onnx(model: nn.Module, example: Tensor) -> tuple[bytes, Callable[[], Tensor | None]]:
    try:
        import onnxscript
    except ImportError as error:
        raise InputError("ONNX needs the package onnxscript", hint="pip install 'prunekit[onnx]'") from error
    del onnxscript  # torch.onnx imports it by itself; asking first gives the clearer error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own internals
        program = torch.onnx.export(_program(model.cpu(), example.cpu()), dynamo=True, verbose=False)
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content, lambda: _run_onnx(content, example)


def _run_onnx(content: bytes, example: Tensor) -> Tensor | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.from_numpy(session.run(None, {name: example.cpu().numpy()})[0])


_WRITERS = {".pt2": _to_pt2, ".onnx": _to_onnx}
