"""What is timed: one layer, or a whole network, as a call in its runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.evaluation.timing.apart import OnnxFile
from prunekit.evaluation.timing.conditions import Conditions
from prunekit.evaluation.timing.layers import LayerShape
from prunekit.exporting.interface import Example
from prunekit.exporting.runtimes import OnnxModel
from prunekit.exporting.writer import ExportOptions, written
from prunekit.surgery.copying import copied
from prunekit.surgery.execution.sources import bound_inputs

Run = Callable[[], object]
_OPSET, _IR = 18, 10


def network(model: nn.Module, example: Any, conditions: Conditions) -> Run:
    """Return a forward of a copy of `model` in eval mode, on random inputs like `example`.

    Raises:
        InputError: The network does not run on these inputs.
    """
    _, inputs = _inputs(model, example, conditions)
    with torch.inference_mode(False):
        ready = copied(model).eval()
    there = tree_map(lambda leaf: leaf.to(conditions.device) if isinstance(leaf, torch.Tensor) else leaf, inputs)
    return lambda: ready(*there)


def onnx_file(model: nn.Module, example: Any, conditions: Conditions) -> OnnxFile:
    """Return `model` as an ONNX file, and random inputs like `example`.

    Raises:
        InputError: The network does not run on these inputs.
        SurgeryError: It cannot be exported.
    """
    arguments, inputs = _inputs(model, example, conditions)
    with torch.inference_mode(False):
        content = written(model, arguments, "onnx", ExportOptions(fixed_batch=conditions.batch)).content
    arrays = [leaf.contiguous().numpy() for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    return OnnxFile(content, tuple(arrays))


def _inputs(model: nn.Module, example: Any, conditions: Conditions) -> tuple[Any, Any]:
    """Return the arguments that a model is called with, and random ones of this batch."""
    arguments = bound_inputs(model, example)
    return arguments, Example.of(model, arguments).random(conditions.batch, torch.Generator().manual_seed(0))


def layer(shape: LayerShape, inputs: int, outputs: int, conditions: Conditions) -> Run:
    """Return a call of one layer with these widths."""
    groups = inputs if shape.is_depthwise else shape.groups
    per_group = inputs // groups
    if shape.is_linear:
        size: tuple[int, ...] = (conditions.batch * shape.positions[0], inputs)
        weight: tuple[int, ...] = (outputs, inputs)
    else:
        size = (conditions.batch, inputs, *shape.input_positions())
        weight = (inputs, outputs, *shape.kernel) if shape.transposed else (outputs, per_group, *shape.kernel)
    make = _in_onnx if conditions.runtime == "onnx" else _in_pytorch
    return make(shape, size, weight, groups, conditions)


def nothing(conditions: Conditions) -> Run:
    """Return the least that the runtime can be asked: what a call costs beside its work."""
    if conditions.runtime == "onnx":
        from onnx import helper

        return _session([helper.make_node("Identity", ["x"], ["y"])], (1, 1), [], conditions)
    one = torch.zeros(1, 1, device=conditions.device)
    return lambda: torch.relu(one)


def _in_pytorch(
    shape: LayerShape, size: tuple[int, ...], weight: tuple[int, ...], groups: int, conditions: Conditions
) -> Run:
    x = torch.full(size, 0.5, device=conditions.device)
    w = torch.full(weight, 0.01, device=conditions.device)
    if shape.is_linear:
        return lambda: F.linear(x, w)
    none = (0,) * len(shape.kernel)
    settings = (shape.stride, shape.padding, shape.dilation, shape.transposed, none, groups)
    return lambda: torch.convolution(x, w, None, *settings)


def _in_onnx(
    shape: LayerShape, size: tuple[int, ...], weight: tuple[int, ...], groups: int, conditions: Conditions
) -> Run:
    from onnx import helper, numpy_helper

    if shape.is_linear:
        node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    else:
        node = helper.make_node(
            "ConvTranspose" if shape.transposed else "Conv",
            ["x", "w"],
            ["y"],
            kernel_shape=shape.kernel,
            strides=shape.stride,
            pads=(*shape.padding, *shape.padding),
            dilations=shape.dilation,
            group=groups,
        )
    return _session([node], size, [numpy_helper.from_array(torch.full(weight, 0.01).numpy(), "w")], conditions)


def _session(nodes: list[Any], size: tuple[int, ...], weights: list[Any], conditions: Conditions) -> Run:
    from onnx import TensorProto, helper

    into = helper.make_tensor_value_info("x", TensorProto.FLOAT, size)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layer", [into], [out], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    with conditions.held():
        session = OnnxModel(model.SerializeToString())
    x = torch.full(size, 0.5)
    return lambda: session(x)
