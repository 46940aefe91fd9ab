"""Recover the layers of an exported program: an operator on the weights of one module is that module.

A program calls `conv2d(x, features.0.weight, features.0.bias, …)`. Where all weights that such a node reads lie under
one name, and every node that reads them agrees on stride, padding and so on, a module of that name stands for the
node; so does one for zero channels that are padded. Layers can then be pruned, restored and tuned like those of any
network; every other node stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.nn.channels import ChannelPad
from prunekit.programs.ops import Ref

_WEIGHTS = ("weight", "bias", "running_mean", "running_var")
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}


@dataclass(frozen=True)
class LayerSpec:
    """A module without values: its name, what it reads, and the settings that distinguish it from others."""

    name: str
    reads: Ref
    make: Callable[[], nn.Module]
    settings: tuple[Any, ...]


def layer_of(
    call: Any,
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    bound: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> LayerSpec | None:
    """Return the layer that a node stands for, or None.

    `bound` gives the dotted names of weights, `tensors` the weights themselves, `values` the JSON of computed values.
    """
    if not isinstance(call, torch._ops.OpOverload):
        return None
    op = call._schema.name.removeprefix("aten::")
    given = {argument.name: argument.default_value for argument in call._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | dict(kwargs)
    if op in _PADS:
        return _pad(given, values)
    described = _KINDS.get(op)
    if described is None:
        return None
    x = given.pop("input")
    found = {leaf: given.pop(leaf, None) for leaf in _WEIGHTS}
    paths = {leaf: bound.get(ref.name, "") for leaf, ref in found.items() if isinstance(ref, Ref)}
    owners = {path.removesuffix(f".{leaf}") for leaf, path in paths.items()}
    (name,) = owners if len(owners) == 1 else ("",)
    if not name or not isinstance(x, Ref) or any(path != f"{name}.{leaf}" for leaf, path in paths.items()):
        return None
    own = {leaf: tensors[path] for leaf, path in paths.items()}
    if any(isinstance(own[leaf], nn.Parameter) != leaf.endswith(("weight", "bias")) for leaf in own):
        return None
    if any(isinstance(value, Ref) for value in given.values()):
        return None
    settings = tuple((key, str(value)) for key, value in given.items())
    rank = len(values[x.name]["sizes"]) if x.name in values else 0
    make = described(own, given, rank)
    return None if make is None else LayerSpec(name, x, make, (call._schema.name, *paths, *settings))


def agreeing(layers: Iterable[LayerSpec]) -> dict[str, LayerSpec]:
    """Return one layer per name; names whose nodes disagree are left out."""
    found: dict[str, LayerSpec] = {}
    refused: set[str] = set()
    for layer in layers:
        if found.setdefault(layer.name, layer).settings != layer.settings:
            refused.add(layer.name)
    return {name: layer for name, layer in found.items() if name not in refused}


_Weights = Mapping[str, Tensor]
_Maker = Callable[[], nn.Module] | None


def _convolution(own: _Weights, given: Mapping[str, Any], _: int) -> _Maker:
    weight, groups = own.get("weight"), given["groups"]
    transposed = bool(given.get("transposed", "output_padding" in given))
    kind: Any = (_TRANSPOSED if transposed else _CONVOLUTIONS).get(weight.dim() if weight is not None else 0)
    if weight is None or kind is None:
        return None
    first, second = weight.size(0), weight.size(1) * groups
    sizes = (first, second) if transposed else (second, first)
    rest = {key: _spread(given[key], weight.dim() - 2) for key in ("stride", "padding", "dilation")}
    if transposed:
        rest["output_padding"] = _spread(given["output_padding"], weight.dim() - 2)
    bias = "bias" in own
    return lambda: kind(*sizes, tuple(weight.shape[2:]), groups=groups, bias=bias, device="meta", **rest)


def _spread(value: Any, dims: int) -> Any:
    """Repeat one number for all dimensions; names of paddings stay as they are."""
    if isinstance(value, str):
        return value
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    return numbers * dims if len(numbers) == 1 else numbers


def _linear(own: _Weights, _: Mapping[str, Any], __: int) -> _Maker:
    weight = own.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    return lambda: nn.Linear(weight.size(1), weight.size(0), bias="bias" in own, device="meta")


def _batch_norm(own: _Weights, given: Mapping[str, Any], rank: int) -> _Maker:
    """Make a batch norm with statistics of its own, as in inference; one that uses the batch's stays an operator."""
    mean, kind = own.get("running_mean"), _NORMS.get(rank)
    if mean is None or kind is None or "running_var" not in own or given.get("training"):
        return None
    if ("weight" in own) != ("bias" in own):
        return None
    channels, settings = mean.numel(), {"eps": given["eps"], "momentum": given["momentum"], "affine": "weight" in own}

    def make() -> nn.Module:
        norm = kind(channels, device="meta", **settings)
        norm.num_batches_tracked = torch.zeros((), dtype=torch.int64)  # a program may have dropped it
        return norm

    return make


def _layer_norm(own: _Weights, given: Mapping[str, Any], _: int) -> _Maker:
    if "weight" not in own:
        return None
    shape, eps, bias = list(given["normalized_shape"]), given["eps"], "bias" in own
    return lambda: nn.LayerNorm(shape, eps=eps, bias=bias, device="meta")


def _group_norm(own: _Weights, given: Mapping[str, Any], _: int) -> _Maker:
    weight = own.get("weight")
    if weight is None or "bias" not in own:
        return None
    groups, eps = given["num_groups"], given["eps"]
    return lambda: nn.GroupNorm(groups, weight.numel(), eps=eps, device="meta")


def _pad(given: Mapping[str, Any], values: Mapping[str, Any]) -> LayerSpec | None:
    """Return the layer for zero channels around those of an image; such modules are named after what they read."""
    x, pad = given["self"], given["pad"]
    if not isinstance(x, Ref) or x.name not in values or not all(isinstance(width, int) for width in pad):
        return None
    *others, before, after = pad
    rank = len(values[x.name]["sizes"])
    if given.get("mode", "constant") != "constant" or given.get("value") or any(others) or len(pad) != 2 * (rank - 1):
        return None
    return LayerSpec(f"{_PADDING}.{x.name}", x, lambda: ChannelPad(before, after), (before, after))


_PADDING = "channel_pads"  # the module that holds those of a program
_PADS = ("pad", "constant_pad_nd")
_KINDS: dict[str, Callable[[_Weights, Mapping[str, Any], int], _Maker]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **{"linear": _linear, "layer_norm": _layer_norm, "group_norm": _group_norm},
}
