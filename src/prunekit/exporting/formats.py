"""Writers of exported files: from a network and an example input to the bytes of a file.

Both formats carry, beside the network, how its images are prepared and the names of its classes. Neither carries the
names of source files, which the exporters would put in.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prunekit.errors import InputError, SurgeryError
from prunekit.exporting.interface import named_outputs, plain
from prunekit.exporting.silence import silenced
from prunekit.spec import Origin
from prunekit.surgery.execution.hooks import hooked

ABOUT = "prunekit.json"  # the extra file of a .pt2, and the key in ONNX's metadata
BATCH = "batch"  # name of a free first dimension
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def about(origin: Origin | None, *, macs: int | None = None, history: bool = False) -> str:
    """Return the notes about a network in its file as JSON: `arch`, `input` (shape, mean, std), `classes`, `macs`.

    `macs` are multiply-accumulates for one input, left out where unknown. With `history` the notes include the steps
    of the network's history.
    """
    known = {} if macs is None else {"macs": macs}
    if origin is None:
        return json.dumps(known)
    spec = origin.input.to_json() if origin.input else None
    facts = {"arch": origin.arch, "input": spec, "classes": list(origin.classes), **known}
    return json.dumps({**facts, "history": [dict(step) for step in origin.history]} if history else facts)


def to_pt2(model: nn.Module, inputs: tuple[Any, ...], shapes: Mapping[str, Any] | None, notes: str) -> bytes:
    """Return the content of a `.pt2` file.

    Args:
        model: The network, in eval mode.
        inputs: The positional arguments of `forward`.
        shapes: torch.export's `dynamic_shapes` by argument: which dimensions may have any size (None: none).
        notes: JSON about the network, see `about`.

    Raises:
        SurgeryError: torch cannot export the model.
    """
    buffer = io.BytesIO()
    with _giving(model, plain):
        torch.export.save(_program(model, inputs, shapes), buffer, extra_files={ABOUT: notes})
    return buffer.getvalue()


def to_onnx(
    model: nn.Module,
    inputs: tuple[Any, ...],
    shapes: Mapping[str, Any] | None,
    opset: int | None,
    notes: str,
    names: tuple[Sequence[str], Sequence[str]],
) -> tuple[bytes, int]:
    """Return the content of an ONNX file, and its operator set.

    Args:
        model: The network, in eval mode.
        inputs: The positional arguments of `forward`.
        shapes: As in `to_pt2`.
        opset: The operator set; None for the exporter's own.
        notes: JSON about the network, see `about`.
        names: The names of the input tensors and of the output tensors, in order.

    Raises:
        InputError: A package is missing, or the operator set cannot be reached.
        SurgeryError: The model cannot be exported.
    """
    try:
        import onnxscript
    except ImportError as error:
        raise InputError("ONNX needs the package onnxscript", hint="pip install 'prunekit[onnx]'") from error
    del onnxscript  # torch.onnx imports it itself; asking first gives the clearer error
    with _giving(model, lambda output: tuple(named_outputs(output).values())):
        program = _program(model, inputs, shapes)
    with silenced():
        try:
            written = torch.onnx.export(
                program, dynamo=True, verbose=False, opset_version=opset, input_names=names[0], output_names=names[1]
            )
            assert written is not None
            proto = written.model_proto
        except Exception as error:  # the exporter's own errors are of many kinds
            raise SurgeryError(f"the model cannot be written as ONNX: {_short(error)}") from error
    found = next(entry.version for entry in proto.opset_import if not entry.domain)
    if opset is not None and found != opset:
        raise InputError(
            f"--opset {opset} cannot be reached: the exporter gives {found}", hint="18 and later always can"
        )
    _tidy(proto, notes)
    try:
        return proto.SerializeToString(), int(found)
    except Exception as error:  # protobuf's limit of 2 GB
        raise SurgeryError(f"the model is too large for one ONNX file: {_short(error)}") from error


@contextlib.contextmanager
def _giving(model: nn.Module, form: Callable[[Any], Any]) -> Iterator[None]:
    """Change the form of the model's output inside: a file is read where the classes of the original are unknown."""
    with hooked([model.register_forward_hook(lambda _module, _inputs, output: form(output))]):
        yield


def _program(model: nn.Module, inputs: tuple[Any, ...], shapes: Mapping[str, Any] | None) -> Any:
    try:
        with torch.no_grad(), silenced():
            program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises errors of many kinds, which say why
        raise _refusal(error, free=shapes is not None) from error
    for node in program.graph.nodes:
        for key in _TRACES:
            node.meta.pop(key, None)
    return program


def _refusal(error: Exception, *, free: bool) -> SurgeryError:
    """Return the error that explains why torch.export refuses, and what may be done."""
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return SurgeryError(
            "the model cannot be exported: its code decides by values that it computes, such as how many boxes are "
            "left over, and an exported graph decides nothing",
            hint="export the part in front of that, such as a detector's backbone and heads",
        )
    hint = "--fixed-batch 1 exports what works for one batch size alone" if free else None
    return SurgeryError(f"the model cannot be exported: {_short(error)}", hint=hint)


def _tidy(proto: Any, notes: str) -> None:
    """Remove the source position of each node, name the free dimension, and add the notes about the network."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for function in proto.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    free = {d.dim_param for v in proto.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
    for value in values:
        del value.metadata_props[:]
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in free:
                dimension.dim_param = BATCH
    entry = proto.metadata_props.add()
    entry.key, entry.value = ABOUT, notes


def _short(error: BaseException) -> str:
    """Return the final cause of an error, without terminal colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:200] or type(error).__name__
