"""An exported program (`torch.export.save`, `.pt2`) as an `nn.Module` that runs it node by node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checkpoint.exported_layers import Layer, agreeing, layer_of
from prunekit.checkpoint.exported_ops import InputDevice, Ref, function, value
from prunekit.errors import InputError
from prunekit.spec import Origin


@dataclass(frozen=True)
class Step:
    """One node: what is called, with which arguments, under which names the results go, and what is done with after.

    With a `layer`, the name of a module, that module is called on `args` instead.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[Any, ...]
    release: tuple[str, ...]
    layer: str = ""


class ExportedProgram(nn.Module):
    """Runs the graph of an exported program on its own weights, which keep their dotted names; layers are modules.

    `inputs` are the names of what it takes, `sizes` those of the first (None where any will do).
    `batch` is the batch size that the program is fixed to, None when it takes any. Larger and smaller batches
    then run in chunks of that size, the last one filled up.
    """

    def __init__(self, graph: Mapping[str, Any], signature: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """`graph` and `signature` are those of the file's JSON; `tensors` its weights and constants by name.

        Raises `UnsupportedError` for what is not plainly a network, and any other exception where the JSON is
        damaged.
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
        steps = _steps(graph["nodes"], keep=_names(self._outputs))
        self._steps = self._furnish(steps, graph["tensor_values"], tensors)
        _check_order(self._steps, self._outputs, {*inputs, *self._bound})
        self.sizes = _sizes(graph["tensor_values"][inputs[0]])
        # a program of several inputs, or of a size that is none, cannot be fed in chunks
        self.batch = (self.sizes[0] or None) if len(inputs) == 1 else None

    def forward(self, *inputs: Tensor) -> Any:
        """The program's output: one value, or a tuple of its values."""
        if len(inputs) != len(self.inputs):
            raise TypeError(f"the program takes {len(self.inputs)} inputs, {len(inputs)} given")
        if self.batch is None or inputs[0].shape[0] == self.batch:
            return self._run(inputs)
        return self._run_in_chunks(inputs[0], self.batch)

    def example(self, origin: Origin | None) -> Tensor:
        """Random images that the program takes, `(N, ...)`, shaped as `origin` says where the program leaves it open.

        Raises:
            InputError: nobody says how large they are.
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
        for name in layers:  # those without weights
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

    def _run(self, inputs: Iterable[Tensor]) -> Any:
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        device = next(iter(values.values())).device
        values.update((name, attrgetter(path)(self)) for name, path in self._bound.items())
        for step in self._steps:
            args = [_look_up(arg, values, device) for arg in step.args]
            kwargs = {key: _look_up(arg, values, device) for key, arg in step.kwargs.items()}
            if step.layer:
                outcome = self.get_submodule(step.layer)(*args)
                if len(step.results) > 1:  # statistics, which nothing reads in inference
                    outcome = (outcome, *(None,) * (len(step.results) - 1))
            else:
                outcome = step.call(*args, **kwargs)
            _store(step.results, outcome, values)
            for name in step.release:
                values.pop(name, None)
        outputs = tuple(_look_up(output, values, device) for output in self._outputs)
        return outputs[0] if len(outputs) == 1 else outputs


_PATHS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}


def filled(model: nn.Module, x: Tensor) -> Tensor:
    """The example input `(1, ...)`, repeated to the batch size where `model` is a program that always runs so many:
    its cost would else be that of a batch.
    """
    batch = model.batch if isinstance(model, ExportedProgram) else None
    return x if batch is None else x[:1].repeat(batch, *(1,) * (x.dim() - 1))


def _at(root: nn.Module, path: str, layers: Mapping[str, Layer]) -> nn.Module:
    """The module at `path`; where there is none it is made, and all on the way, as the layers of these names are."""
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


def _steps(nodes: list[dict[str, Any]], keep: set[str]) -> tuple[Step, ...]:
    """Decode the nodes; what no later node reads is released at once, so that memory holds what is alive."""
    steps: list[Step] = []
    alive = set(keep)
    for node in reversed(nodes):
        # kind 2 is a keyword; older files do not say, and mean a position
        args = tuple(value(item["arg"]) for item in node["inputs"] if item.get("kind") != 2)
        kwargs = {item["name"]: value(item["arg"]) for item in node["inputs"] if item.get("kind") == 2}
        results = tuple(value(output) for output in node["outputs"])
        used = _names((*args, *kwargs.values(), *results))
        steps.append(Step(function(node["target"]), args, kwargs, results, tuple(used - alive)))
        alive |= used
    return tuple(reversed(steps))


def _check_order(steps: Iterable[Step], outputs: tuple[Any, ...], known: set[str]) -> None:
    """Raise `ValueError` where something is read that nothing before it has computed."""
    for reads, results in (*(((*step.args, *step.kwargs.values()), step.results) for step in steps), (outputs, ())):
        unknown = _names(reads) - known
        if unknown:
            raise ValueError(f"'{min(unknown)}' is read before it is computed")
        known |= _names(results)


def _names(values: Iterable[Any]) -> set[str]:
    found: set[str] = set()
    for item in values:
        if isinstance(item, Ref):
            found.add(item.name)
        elif isinstance(item, list):
            found |= _names(item)
    return found


def _look_up(item: Any, values: Mapping[str, Any], device: torch.device) -> Any:
    if isinstance(item, Ref):
        return values[item.name]
    if isinstance(item, list):
        return [_look_up(part, values, device) for part in item]
    return device if item is InputDevice else item


def _store(results: tuple[Any, ...], outcome: Any, values: dict[str, Any]) -> None:
    """Name what a node gave: nothing, one value, or several."""
    if len(results) == 1:
        _name(results[0], outcome, values)
    elif results:
        _name(list(results), outcome, values)


def _name(result: Any, computed: Any, values: dict[str, Any]) -> None:
    if isinstance(result, Ref):
        values[result.name] = computed
    elif isinstance(result, list):
        for part, piece in zip(result, computed, strict=True):
            _name(part, piece, values)


def _sizes(tensor: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The sizes of the program's first input; None where it takes any."""
    return tuple(size.get("as_int") for size in tensor["sizes"])
