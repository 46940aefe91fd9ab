"""An exported program (`torch.export.save`, `.pt2`) as an `nn.Module` that runs it node by node."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.programs.judge import ExcessError, judge, twin
from prunekit.programs.layers import LayerSpec, agreeing, layer_of
from prunekit.programs.ops import dtype, value
from prunekit.programs.steps import Step, check_order, decode, look_up, names
from prunekit.spec import Origin

# Numbers in the inputs to which a program is fixed.
_LARGEST_BATCH = 1 << 26


class ExportedProgram(nn.Module):
    """The graph of an exported program, run on its own weights, which keep their dotted names; layers are modules.

    `inputs` are the names of its inputs, `sizes` the sizes of the first (None where any will do). `batch` is the batch
    size to which the program is fixed, None where it takes any. Larger and smaller batches then run in chunks of that
    size, the last one padded.
    """

    def __init__(self, graph: Mapping[str, Any], signature: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Decode a program and register its weights.

        Args:
            graph: The graph in the file's JSON.
            signature: The signature in the file's JSON.
            tensors: Weights and constants by name.

        Raises:
            UnsupportedError: The program is not plainly a network. Damaged JSON may raise any other exception.
        """
        super().__init__()
        self._bound: dict[str, str] = {}
        inputs: list[str] = []
        for spec in signature["input_specs"]:
            ((kind, content),) = spec.items()
            name = value({"as_tensor": content["arg"]} if kind != "user_input" else content["arg"]).name
            if kind == "user_input":
                inputs.append(name)
            else:
                self._bound[name] = content[_PATHS[kind]]
        self.inputs = tuple(inputs)
        self._outputs = tuple(
            value(spec["user_output"]["arg"]) for spec in signature["output_specs"] if "user_output" in spec
        )
        steps = decode(graph["nodes"], keep=names(self._outputs))
        check_order(steps, self._outputs, {*inputs, *self._bound})
        self._judged: set[Any] = set()
        self._judge_claims(steps, [graph["tensor_values"][name] for name in inputs], tensors)
        self._steps = self._furnish(steps, graph["tensor_values"], tensors)
        self.sizes = _sizes(graph["tensor_values"][inputs[0]])
        # a program of several inputs, or whose batch size is none, cannot be fed in chunks
        self.batch = (self.sizes[0] or None) if len(inputs) == 1 else None

    def forward(self, *inputs: Tensor) -> Any:
        """Return the output of the program: one value, or a tuple of values."""
        if len(inputs) != len(self.inputs):
            raise TypeError(f"the program takes {len(self.inputs)} inputs, {len(inputs)} given")
        if self.batch is None or inputs[0].shape[0] == self.batch:
            return self._run(inputs)
        return self._run_in_chunks(inputs[0], self.batch)

    def example(self, origin: Origin | None) -> Tensor:
        """Return random images for the program, `(N, ...)`, sized by `origin` where the program leaves that open.

        Raises:
            InputError: Neither says how large they are.
        """
        shape: tuple[int | None, ...] = origin.input.shape if origin and origin.input else self.sizes[1:]
        if any(size is None for size in shape):
            raise InputError(
                "the program does not say how large its input is", hint="add --input-size, such as 3x224x224"
            )
        kind = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        sizes = (self.batch or 2, *(size or 1 for size in shape))
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(kind)

    def _furnish(
        self, steps: tuple[Step, ...], values: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[Step, ...]:
        """Register the weights, those of layers in modules of their kinds, and let the steps call these."""
        found = [layer_of(step.call, step.args, step.kwargs, self._bound, tensors, values) for step in steps]
        layers = agreeing(layer for layer in found if layer is not None)
        for path in self._bound.values():
            owner, _, leaf = path.rpartition(".")
            _register(_at(self, owner, layers), leaf, tensors[path])
        for name in layers:  # layers without weights
            _at(self, name, layers)
        return tuple(
            dataclasses.replace(step, args=(layer.reads,), kwargs={}, layer=layer.name)
            if layer is not None and layer.name in layers
            else step
            for step, layer in zip(steps, found, strict=True)
        )

    def _run_in_chunks(self, x: Tensor, size: int) -> Tensor:
        outputs = []
        for chunk in torch.split(x, size):
            filling = chunk[-1:].expand(size - len(chunk), *chunk.shape[1:])
            outputs.append(self._run((torch.cat((chunk, filling)),))[: len(chunk)])
        return torch.cat(outputs)

    def _run(self, inputs: Sequence[Tensor]) -> Any:
        self._judge(inputs)
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        device = inputs[0].device
        values.update((name, attrgetter(path)(self)) for name, path in self._bound.items())
        for step in self._steps:
            step.run(values, device, self.get_submodule)
        outputs = tuple(look_up(output, values, device) for output in self._outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _judge_claims(
        self, steps: tuple[Step, ...], described: list[Mapping[str, Any]], tensors: Mapping[str, Tensor]
    ) -> None:
        """Refuse a program that asks for more than its file holds, on inputs of the sizes in the file."""
        sizes = [shape for shape in map(_claimed, described) if shape is not None]
        if len(sizes) < len(described):
            return  # judged when inputs arrive
        if sum(map(math.prod, sizes)) > _LARGEST_BATCH:
            raise ExcessError(f"inputs of {' and '.join(map(str, sizes))}")
        inputs = [
            torch.empty(shape, dtype=dtype(tensor["dtype"]), device="meta")
            for shape, tensor in zip(sizes, described, strict=True)
        ]
        values = dict(zip(self.inputs, inputs, strict=True))
        values |= {name: twin(tensors[path]) for name, path in self._bound.items()}
        judge(steps, values, self.get_submodule, sum(map(_nbytes, tensors.values())))
        self._judged.add(_kinds(inputs))

    def _judge(self, inputs: Sequence[Tensor]) -> None:
        """Refuse inputs on which the program asks for more than they justify, where the file leaves sizes open."""
        if _is_traced(inputs) or (kinds := _kinds(inputs)) in self._judged:
            return
        # in a thread of its own: a recorder of this forward must see neither the judging nor the twins that it runs on
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._judge_inputs, inputs).result()
        self._judged.add(kinds)

    def _judge_inputs(self, inputs: Sequence[Tensor]) -> None:
        values = {name: twin(tensor) for name, tensor in zip(self.inputs, inputs, strict=True)}
        values |= {name: twin(attrgetter(path)(self)) for name, path in self._bound.items()}
        held = sum(map(_nbytes, (*self.parameters(), *self.buffers(), *inputs)))
        judge(self._steps, values, self._layer_twin, held)

    def _layer_twin(self, name: str) -> nn.Module:
        """Return a copy of the layer on the meta device, without hooks that others have put on it."""
        layer = self.get_submodule(name)
        memo: dict[int, Any] = {id(tensor): twin(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
        memo |= {id(hooks): {} for m in layer.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)}
        return copy.deepcopy(layer, memo)


_PATHS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}


def filled(model: nn.Module, x: Tensor) -> Tensor:
    """Repeat the example input `(1, ...)` to the batch size of a program that is fixed to one.

    Otherwise its cost would be that of a whole batch.
    """
    batch = model.batch if isinstance(model, ExportedProgram) else None
    return x if batch is None else x[:1].repeat(batch, *(1,) * (x.dim() - 1))


def _at(root: nn.Module, path: str, layers: Mapping[str, LayerSpec]) -> nn.Module:
    """Return the module at `path`; make it and its parents where missing, by `layers` where that has their names."""
    module, parts = root, path.split(".") if path else []
    for depth, part in enumerate(parts, start=1):
        if part not in module._modules:
            layer = layers.get(".".join(parts[:depth]))
            module.add_module(part, nn.Module() if layer is None else layer.make())
        module = module.get_submodule(part)
    return module


def _register(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def _sizes(tensor: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the sizes of the program's first input; None where it takes any."""
    return tuple(size.get("as_int") for size in tensor["sizes"])


def _claimed(tensor: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return an input's sizes, fixed or else as exported; None where one is unknown."""
    sizes = [
        size["as_int"] if "as_int" in size else ((size.get("as_expr") or {}).get("hint") or {}).get("as_int")
        for size in tensor["sizes"]
    ]
    known = tuple(size for size in sizes if size is not None)
    return known if len(known) == len(sizes) else None


def _kinds(inputs: Iterable[Tensor]) -> Any:
    return tuple((tuple(x.shape), x.dtype) for x in inputs)


def _is_traced(inputs: Iterable[Tensor]) -> bool:
    """Return whether an exporter traces this forward, with symbolic sizes."""
    return torch.compiler.is_compiling() or not all(type(size) is int for x in inputs for size in x.shape)


def _nbytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
