"""Nests of tensors: tuples, lists and dictionaries of them, as batches and outputs are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nest, in order."""
    return (leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor))


def floats_in(nest: Any) -> list[Tensor]:
    """Return the floating-point tensors of a nest, in order, at least in float32."""
    found = (tensor for tensor in tensors_in(nest) if tensor.is_floating_point())
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in found]


def size_of(batch: Any) -> int:
    """Return the number of examples in a batch."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), 1)


def placed(nest: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Return a nest on `device`, its floating-point tensors as `dtype`."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None, non_blocking=True)

    return tree_map(place, nest)


def shapes_in(nest: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the floating-point tensors in a nest, in order."""
    return [tuple(tensor.shape) for tensor in floats_in(nest)]


def described(nest: Any) -> str:
    """Return the shapes of the tensors in a nest, for people."""
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_in(nest)]
    return " and ".join(shapes) if shapes else f"a {type(nest).__name__}"


def called(model: nn.Module, inputs: Any) -> Any:
    """Return the output of a network for inputs: one tensor, a tuple of arguments, or a dictionary of them by name."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def floating_type(model: nn.Module) -> torch.dtype:
    """Return the dtype of a network's weights, which what it reads must have."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
