"""The numbers that modules keep about their own shapes, and that must follow when their parameters shrink."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from prunekit.errors import InputError
from prunekit.nn.channels import ChannelPad

# Module type -> the attributes that describe its shape, as they are stored in a file.
SHAPE_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    _ConvNd: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    _NormBase: ("num_features",),
    nn.LayerNorm: ("normalized_shape",),
    nn.GroupNorm: ("num_channels",),
    nn.PReLU: ("num_parameters",),
    nn.Embedding: ("embedding_dim",),
    ChannelPad: ("before", "after"),
}

_SET = "_numbers_set_by_surgery"  # where a module keeps the names of its own numbers that are no longer as it was built


def names_of(module: nn.Module) -> tuple[str, ...]:
    """Return the shape attributes of a module; empty where its type is not known to have any."""
    for kind, names in SHAPE_ATTRIBUTES.items():
        if isinstance(module, kind):
            return names
    return ()


def own_numbers(module: nn.Module) -> dict[str, Any]:
    """Return the plain numbers, and tuples or lists of them, that a module which is not one of PyTorch's holds."""
    if type(module).__module__.startswith("torch."):
        return {}
    return {name: value for name, value in vars(module).items() if name[0] != "_" and _is_number(value)}


def own_factors(module: nn.Module) -> dict[str, float]:
    """Return the plain positive fractions that a module which is not one of PyTorch's holds, such as `scale`."""
    if type(module).__module__.startswith("torch."):
        return {}
    own = {name: value for name, value in vars(module).items() if name[0] != "_" and type(value) is float}
    return {name: value for name, value in own.items() if 0 < value < math.inf}


def _is_number(value: Any) -> bool:
    return type(value) is int or (
        isinstance(value, tuple | list) and value != () and all(type(n) is int for n in value)
    )


def set_numbers(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Set some of a module's own numbers, and remember which, for `read`."""
    for name, value in values.items():
        setattr(module, name, value)
    setattr(module, _SET, tuple(dict.fromkeys((*vars(module).get(_SET, ()), *values))))


def with_counts(module: nn.Module, counts: Mapping[tuple[str, int | None], int]) -> dict[str, Any]:
    """Return the module's numbers as they are with some set, which are given by attribute and place in it."""
    values: dict[str, Any] = {}
    for (name, place), count in counts.items():
        if place is None:
            values[name] = count
        else:
            several = list(values.get(name, getattr(module, name)))
            several[place] = count
            values[name] = type(getattr(module, name))(several)
    return values


def read(module: nn.Module) -> dict[str, Any]:
    """Return the module's shape attributes, and those of its own numbers that surgery has set, as JSON."""
    values = {name: getattr(module, name) for name in (*names_of(module), *vars(module).get(_SET, ()))}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def write(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Set shape attributes that `read` has given.

    Raises:
        InputError: a name that is neither a shape attribute nor a number of this module, or a number that has grown.
    """
    for name, value in values.items():
        if name in names_of(module):
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
        else:
            set_numbers(module, {name: _narrower(module, name, value)})


def _narrower(module: nn.Module, name: str, value: Any) -> Any:
    """Return a value for one of a module's own numbers, in the type that it has; surgery makes no size larger."""
    if name in own_factors(module) and type(value) is float and 0 < value < math.inf:
        return value
    old = own_numbers(module).get(name)
    if old is None:
        raise InputError(f"'{name}' is not a shape attribute of a {type(module).__name__}")
    before, after = (v if isinstance(v, tuple | list) else [v] for v in (old, value))
    fits = len(before) == len(after) and isinstance(old, int) == isinstance(value, int)
    if not fits or not all(type(n) is int and 0 < n <= most for n, most in zip(after, before, strict=False)):
        raise InputError(
            f"the file sets '{name}' of a {type(module).__name__} to {value!r:.60}; here it is {old!r:.60}"
        )
    return value if isinstance(old, int) else type(old)(value)


def fit(module: nn.Module, before: Mapping[str, tuple[int, ...]]) -> None:
    """Bring a module's numbers in line with its parameters; `before` holds their earlier shapes."""
    if isinstance(module, _ConvNd):
        _fit_convolution(module, before["weight"])
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        sized = module.weight if module.weight is not None else module.running_mean
        if sized is not None:
            module.num_features = sized.numel()
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = module.weight.numel()
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.size(1)


def _fit_convolution(conv: _ConvNd, before: tuple[int, ...]) -> None:
    """Fit the numbers of a convolution: depthwise layers lose groups with their channels; others keep theirs."""
    if conv.transposed:
        if conv.groups == before[0]:
            conv.groups = conv.weight.size(0)
        conv.in_channels, conv.out_channels = conv.weight.size(0), conv.weight.size(1) * conv.groups
        return
    if conv.groups > 1 and before[1] == 1:
        conv.groups = conv.groups * conv.weight.size(0) // before[0]
    conv.in_channels, conv.out_channels = conv.weight.size(1) * conv.groups, conv.weight.size(0)
