"""Weights that a layer computes from others: masks of `torch.nn.utils.prune`, weight and spectral norms, and whatever
`torch.nn.utils.parametrize` has registered. Surgery works on plain weights, which `materialised` gives a network;
`reparametrised.py` puts the parametrisations back into the smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from prunekit.surgery.copying import copied


@dataclass(frozen=True)
class Kind:
    """A parametrisation that is a hook: how its tensors' names end, what it computes, and how it is removed."""

    endings: tuple[str, ...]
    value: Callable[[Any, Any], Tensor]
    remove: Callable[[nn.Module, str], object]


HOOKS: Mapping[type, Kind] = {
    prune.BasePruningMethod: Kind(("_orig", "_mask"), lambda hook, own: hook.apply_mask(own), prune.remove),
    WeightNorm: Kind(("_g", "_v"), lambda hook, own: hook.compute_weight(own), remove_weight_norm),
    SpectralNorm: Kind(("_orig", "_u", "_v"), lambda hook, own: hook.compute_weight(own, False), remove_spectral_norm),
}


def kind_of(hook: Any) -> Kind:
    """Return what is known about a hook that computes a weight."""
    return next(kind for own, kind in HOOKS.items() if isinstance(hook, own))


@dataclass(frozen=True)
class Computed:
    """A weight that a module computes: the names of the module and of the weight in it, and what computes it.

    `by` is a hook, or a `ParametrizationList`.
    """

    path: str
    leaf: str
    by: Any

    @property
    def name(self) -> str:
        """The dotted name of the weight."""
        return f"{self.path}.{self.leaf}" if self.path else self.leaf

    @property
    def method(self) -> str:
        """The class of what computes it."""
        kinds = [type(one) for one in (self.by if isinstance(self.by, ParametrizationList) else [self.by])]
        return ", ".join(kind.__name__.lstrip("_") for kind in kinds)

    def tensors(self, owner: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that it is computed from, by name: in the list, or in the module."""
        if isinstance(self.by, ParametrizationList):
            return {**dict(self.by.named_parameters()), **dict(self.by.named_buffers())}
        return {self.leaf + ending: getattr(owner, self.leaf + ending) for ending in kind_of(self.by).endings}


def computed(model: nn.Module) -> list[Computed]:
    """Return every computed weight of a network."""
    found = []
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            found += [Computed(path, leaf, by) for leaf, by in lists.items()]
        hooks: list[Any] = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, tuple(HOOKS))]
        for hook in hooks:
            leaf = hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name
            found.append(Computed(path, leaf, hook))
    return found


def materialised(model: nn.Module) -> nn.Module:
    """Return `model` with plain weights where it computes them; the same object where it computes none."""
    if not computed(model):
        return model
    plain = copied(model)
    for weight in reversed(computed(plain)):  # a mask may lie on what a norm is computed from
        make_plain(plain, weight)
    return plain


def make_plain(model: nn.Module, weight: Computed) -> None:
    """Let a computed weight be a parameter that has its present value, in place."""
    owner = model.get_submodule(weight.path)
    grad = any(tensor.requires_grad for tensor in weight.tensors(owner).values())
    if isinstance(weight.by, ParametrizationList):
        return _take_from_list(owner, weight, grad)
    kind_of(weight.by).remove(owner, weight.leaf)
    getattr(owner, weight.leaf).requires_grad_(grad)
    return None


def _take_from_list(owner: nn.Module, weight: Computed, grad: bool) -> None:
    """Take a computed weight out of its parametrisation list.

    Not by `remove_parametrizations`: it writes over originals that others share, and breaks copies of the module.
    """
    lists: Any = owner.parametrizations
    with torch.no_grad():
        value = weight.by.eval()().detach().clone()  # spectral norms change their state in training mode
    variable = any(isinstance(t, nn.Parameter) for t in weight.tensors(owner).values())
    kind = _own_class(owner)
    delattr(kind, weight.leaf)
    del lists[weight.leaf]
    if not lists:
        del owner.parametrizations
        owner.__class__ = kind.__bases__[0]
    if variable:
        owner.register_parameter(weight.leaf, nn.Parameter(value, requires_grad=grad))
    else:
        owner.register_buffer(weight.leaf, value)


def _own_class(owner: nn.Module) -> type:
    """Give this module a class of its own, and return it: copies share the class that has the weights as properties."""
    kind = type(owner)
    owner.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    return owner.__class__


def match_computed(model: nn.Module, names: Collection[str]) -> None:
    """Bring a freshly built network, in place, to computing what one with these parameters and buffers computes.

    Weights that are plain parameters there become such; masks that are there, put on after the network was built, come
    to be. Other parametrisations are for the code that builds it.
    """
    for weight in reversed(computed(model)):
        if weight.name in names:
            make_plain(model, weight)
    for path, module in model.named_modules():
        for leaf in list(module._parameters):
            name = f"{path}.{leaf}" if path else leaf
            if f"{name}_orig" in names and f"{name}_mask" in names:
                prune.identity(module, leaf)  # type: ignore[no-untyped-call]
