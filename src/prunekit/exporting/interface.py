"""Inputs and outputs of a network in any containers: tensors by name, and inputs like an example."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.errors import InputError
from prunekit.surgery.execution.sources import as_inputs

INPUT, OUTPUT = "input", "output"
# symbolic sizes, which stand for numbers while torch.export traces, hold all its state
_NO_CONTAINERS = (list, tuple, type, nn.Module, torch.SymInt, torch.SymFloat, torch.SymBool)


def plain(output: Any) -> Any:
    """Return a network's output as tensors in tuples, lists and dicts, which any process can read.

    Named tuples, dataclasses, mappings of other classes (Hugging Face's `ModelOutput`) and objects that hold tensors
    become dicts. Anything but a tensor becomes None, and is left out of dicts.
    """
    return _plain(output, ())


def named_outputs(output: Any) -> dict[str, Tensor]:
    """Return the tensors of a network's output, in order, by their names in an exported file.

    A name is the path of keys, fields and positions to the tensor, such as `out`, `features.0` or `output_1.boxes`; a
    single tensor is called `output`.

    Raises:
        InputError: There is no tensor.
    """
    found = _named(plain(output), OUTPUT, ())
    if not found:
        raise InputError(
            f"the model's output, {type(output).__name__}, holds no tensor",
            hint="expected tensors, or tuples, lists, dicts and objects of them",
        )
    return found


def named_inputs(arguments: Mapping[str, Any], taken: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors among the arguments of `forward`, in order, by name; a single one is called `input`.

    Names that are `taken`, by outputs, get an underscore.
    """
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    alone = len(arguments) == 1 and len(leaves) == 1
    return _named(leaves[0] if alone else dict(arguments), INPUT, taken)


def arguments_of(model: nn.Module, inputs: Sequence[Any]) -> dict[str, Any]:
    """Return the positional `inputs` by the names of `forward`'s parameters.

    Raises:
        InputError: `forward` takes fewer, or needs more.
    """
    try:
        return dict(inspect.signature(model.forward).bind(*inputs).arguments)
    except TypeError as error:
        given = f"{len(inputs)} input{'s' if len(inputs) != 1 else ''}"
        raise InputError(f"the model does not take {given}: {error}", hint=how_to_call(model)) from error


def how_to_call(model: nn.Module) -> str:
    """Return a hint for an example input that the model does not accept."""
    parameters = inspect.signature(model.forward).parameters.values()
    wanted = ", ".join(str(one.replace(annotation=one.empty)) for one in parameters)
    return f"its forward is ({wanted}); give all that it needs in this order: x=(..., ...), or --inputs SIZE,..."


@dataclass(frozen=True)
class Example:
    """The positional inputs of a network, described by one example.

    `batch` is the size of the first dimension that all tensors with images share, None where there is none: a list of
    images `(C, H, W)` has no batch dimension. `kind` is the dtype in which the network computes.
    """

    inputs: tuple[Any, ...]
    batch: int | None
    kind: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, x: Any) -> Example:
        """Describe the example `x`, a tensor or a tuple of positional inputs, for `model`."""
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        inputs = as_inputs(x)
        return cls(inputs, batch_of(inputs), kind)

    def random(self, size: int, generator: torch.Generator, *, shuffled: bool = False) -> tuple[Any, ...]:
        """Return inputs of the same shapes with `size` images: standard normal numbers, and integers from the example.

        The integers stay valid that way, whatever they mean; with `shuffled` they stand in another order.
        """

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            batched = self.batch is not None and leaf.dim() > 0 and len(leaf) == self.batch
            shape = (size, *leaf.shape[1:]) if batched else tuple(leaf.shape)
            if leaf.is_floating_point():
                return torch.randn(shape, generator=generator).to(self.kind)
            if leaf.is_meta:
                return torch.zeros(shape, dtype=leaf.dtype)
            known = leaf.detach().cpu()
            whole = known[torch.arange(size) % len(known)] if batched else known
            if not shuffled:
                return whole.clone()
            return whole.flatten()[torch.randperm(whole.numel(), generator=generator)].view(shape)

        filled: tuple[Any, ...] = tree_map(fill, self.inputs)
        return filled

    def free(self, arguments: Mapping[str, Any], size: int, dimension: Any) -> dict[str, Any] | None:
        """Return torch.export's `dynamic_shapes`: `dimension` for the first one of each tensor with `size` images."""
        if self.batch is None:
            return None
        shapes: dict[str, Any] = tree_map(
            lambda leaf: {0: dimension} if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size else None,
            dict(arguments),
        )
        return shapes


def batch_of(inputs: Any) -> int | None:
    """Return the number of images along the first dimension of `inputs`; None where that is no batch dimension."""
    inputs = as_inputs(inputs)
    first = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), None)
    listed = any(isinstance(item, list | tuple) and _holds(item, first) for item in inputs)
    return None if first is None or (listed and first.dim() == 3) else len(first)


def each(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the inputs with `change` applied to every tensor that has one entry per image."""
    size = batch_of(inputs)
    return tree_map(lambda t: change(t) if isinstance(t, Tensor) and t.dim() and len(t) == size else t, inputs)


def _holds(items: Iterable[Any], tensor: Tensor | None) -> bool:
    return any(item is tensor for item in items)


def _plain(value: Any, above: tuple[int, ...]) -> Any:
    if isinstance(value, Tensor):
        return value
    if id(value) in above:  # an object that refers to itself
        return None
    above = (*above, id(value))
    fields = _fields(value)
    if fields is not None:
        parts = {key: _plain(item, above) for key, item in fields.items()}
        return {key: part for key, part in parts.items() if _tensors(part)}
    if isinstance(value, list | tuple):
        inner = [_plain(item, above) for item in value]
        return tuple(inner) if isinstance(value, tuple) else inner
    return None


def _fields(value: Any) -> Mapping[str, Any] | None:
    """Return the named parts; None where parts are numbered, or there are none."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    slots = getattr(type(value), "__slots__", ())
    if isinstance(value, _NO_CONTAINERS) or not (hasattr(value, "__dict__") or slots):
        return None
    return {name: getattr(value, name) for name in (*getattr(value, "__dict__", ()), *slots) if hasattr(value, name)}


def _tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _named(value: Any, alone: str, taken: Iterable[str]) -> dict[str, Tensor]:
    names: dict[str, Tensor] = {}
    used = set(taken)
    for path, tensor in _paths(value, ()):
        name = re.sub(r"[^\w.\-]", "_", ".".join(path))
        if not path:
            name = alone
        elif not name or name[0].isdigit() or name[0] == ".":
            name = f"{alone}_{name}"
        while name in used:
            name += "_"
        used.add(name)
        names[name] = tensor
    return names


def _paths(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in parts:
            yield from _paths(item, (*path, str(key)))
