"""The shape of a network as JSON, and giving that shape to a freshly built one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from prunekit.errors import InputError
from prunekit.nn.attention import count_heads, freed_modules, restore_freed
from prunekit.nn.buckets import describe_buckets, restore_buckets
from prunekit.nn.channels import SelectedNorm
from prunekit.nn.gated import describe_gates, restore_gates
from prunekit.nn.norms import describe_norms, restore_norms
from prunekit.nn.skipped import describe_skips, restore_skips
from prunekit.surgery.editing import attributes
from prunekit.surgery.editing.parametrised import match_computed


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what surgery may have changed: shapes, the numbers kept about them, and the modules that it has put in.

    `{"parameters": {name: shape}, "attributes": {module: {name: value}}, "selected": [batch norm, ...],
    "skipped": {block: {...}}, "heads": [attention, ...], "gates": [gate, ...], "buckets": {...}, "norms": {...}}`;
    parameters include buffers that a state dict holds. `skipped` are residual blocks without their branch
    (`nn/skipped.py`), `heads` attention modules whose heads are free of the embedding's width (`nn/attention.py`),
    `norms` the batch-norm statistics of a gated network's budgets. What a network has none of has no entry.
    """
    gates, buckets, freed = describe_gates(model), describe_buckets(model), freed_modules(model)
    skips, norms = describe_skips(model), describe_norms(model)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = {name: attributes.read(module) for name, module in model.named_modules()}
    return {
        "parameters": shapes,
        "attributes": {name: values for name, values in modules.items() if values},
        "selected": [name for name, module in model.named_modules() if isinstance(module, SelectedNorm)],
        **({"skipped": skips} if skips else {}),
        **({"heads": freed} if freed else {}),
        **({"gates": gates} if gates else {}),
        **({"buckets": buckets} if buckets else {}),
        **({"norms": norms} if norms else {}),
    }


def conform(model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
    """Give a freshly built `model` the shape that `describe` has noted; its values are then for loading.

    The shapes of parameters are taken as those of weights at hand; everything else is measured by them.

    Raises:
        InputError: the structure names a parameter or module that this architecture does not have, or numbers that
            its own weights do not bear out.
    """
    shapes = structure["parameters"]
    _check_numbers(structure["attributes"], shapes)
    restore_skips(model, structure.get("skipped", {}), shapes)
    for name in structure.get("selected", ()):
        _insert_selection(model, name)
    restore_freed(model, structure.get("heads", ()))
    restore_gates(model, structure.get("gates", ()), shapes)
    restore_buckets(model, structure.get("buckets"), shapes)
    restore_norms(model, structure.get("norms"), shapes)
    match_computed(model, shapes)
    own = model.state_dict(keep_vars=True)
    resized: dict[int, torch.Tensor] = {}  # a tied weight stays one tensor under all of its names
    for name, shape in shapes.items():
        if name not in own:
            _create(model, name, shape)
        elif list(own[name].shape) != list(shape):
            _replace(model, name, resized.setdefault(id(own[name]), _resized(own[name], shape)))
    modules = dict(model.named_modules())
    for name, values in structure["attributes"].items():
        if name not in modules:
            raise InputError(f"the file describes a module '{name}' that its architecture does not have")
        attributes.write(modules[name], values)
    count_heads(model)
    return model


def _check_numbers(described: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, list[int]]) -> None:
    """Raise if a module keeps a number that exceeds every size of its weights: padding would allocate it."""
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    for module, values in described.items():
        for name, value in values.items():
            if type(value) is float:  # a factor, which allocates nothing
                continue
            numbers = value if isinstance(value, list) else [value]
            if not numbers or not all(type(number) is int and 0 <= number <= widest for number in numbers):
                raise InputError(f"the file gives '{module}' {name}={value!r}, and its widest weight has {widest}")


def _insert_selection(model: nn.Module, name: str) -> None:
    norm = dict(model.named_modules()).get(name)
    if not isinstance(norm, _NormBase):
        raise InputError(f"the file puts a channel selection before '{name}', which is no batch norm here")
    first = torch.zeros(1, dtype=torch.int64, device=next(norm.parameters()).device)
    model.set_submodule(name, SelectedNorm(norm, first))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path), leaf
    except AttributeError:
        raise InputError(f"the file holds a parameter '{name}' that its architecture does not have") from None


def _resized(old: torch.Tensor, shape: list[int]) -> torch.Tensor:
    empty = old.detach().new_empty(shape)
    return nn.Parameter(empty, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else empty


def _replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module, leaf = _owner(model, name)
    setattr(module, leaf, tensor)


def _create(model: nn.Module, name: str, shape: list[int]) -> None:
    """Create a bias where a constant had nowhere to go: surgery adds no other tensors."""
    module, leaf = _owner(model, name)
    if leaf != "bias" or getattr(module, "bias", "absent") is not None:
        raise InputError(f"the file holds a parameter '{name}' that its architecture does not have")
    like = next(module.parameters())
    module.bias = nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
