"""Networks that compute some of their weights from others, and how they are cut; `parametrised.py` says which.

The tensors that a weight is computed from are cut as the weight is. Where they then give the cut weight, or can be set
so that they do (the magnitudes of a weight norm; an inverse that the parametrisation has), it stays computed. Where
they cannot (the largest singular value of a cut matrix is another one), it becomes a plain parameter.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList, type_before_parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from prunekit.errors import SurgeryError
from prunekit.plan import Plan
from prunekit.surgery.copying import Memo, copied, named_tensors
from prunekit.surgery.editing.editor import edit, take
from prunekit.surgery.editing.parametrised import Computed, computed, kind_of, materialised
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.labels import Ids
from prunekit.surgery.graph.resolved import resolve
from prunekit.surgery.unwrap import release

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A pruned network; the same one with plain weights, which is what is proven; and the computed weights that are
    plain parameters now, by name and method: those whose parametrisation cannot give the cut weight, or has a part in
    another one.
    """

    model: nn.Module
    plain: nn.Module
    left: tuple[str, ...]


def pruned(model: nn.Module, plain: nn.Module, plan: Plan, graph: Graph) -> Result:
    """Return `model` with `plan` applied. `plain` is `materialised(model)`, and `graph` what was read from that.

    Raises:
        SurgeryError: the plan does not fit the network.
    """
    cut = release(edit(plain, plan, graph))
    if plain is model:
        return Result(cut, cut, ())
    small, found, indices = copied(cut), computed(model), resolve(graph, plan).indices
    left = []
    for weight in found:
        if any(_is_part(weight, other) for other in found):
            continue
        apart = not any(_is_part(other, weight) and other.path == weight.path for other in found)
        shape = graph.shapes[weight.name]
        dims = {dim: indices[weight.name, dim] for dim in range(len(shape)) if (weight.name, dim) in indices}
        if not (apart and _alone(model, weight, found) and _restore(small, model, weight, shape, dims)):
            left.append(f"{weight.name} ({weight.method})")
    _check(small, cut)
    return Result(small, cut, tuple(left))


def _check(small: nn.Module, cut: nn.Module) -> None:
    """Raise unless what `small` computes are the weights of `cut`, which the proof is about."""
    have = named_tensors(materialised(small))
    for name, value in named_tensors(cut).items():
        if name not in have or not close(have[name], value):
            raise SurgeryError(f"'{name}' of the pruned network is not the weight that the plan gives it")


def _is_part(part: Computed, whole: Computed) -> bool:
    """Return whether one is among the tensors that another is computed from."""
    if isinstance(whole.by, ParametrizationList):
        return f"{part.path}.".startswith(f"{whole.path}.parametrizations.{whole.leaf}.".lstrip("."))
    return part.path == whole.path and part.leaf in [whole.leaf + ending for ending in kind_of(whole.by).endings]


def _alone(model: nn.Module, weight: Computed, found: list[Computed]) -> bool:
    """Return whether no other computed weight has a part in its tensors."""
    own = {id(t) for t in weight.tensors(model.get_submodule(weight.path)).values()}
    others = [other for other in found if other is not weight and not _is_part(other, weight)]
    return not any(id(t) in own for o in others for t in o.tensors(model.get_submodule(o.path)).values())


def _restore(
    small: nn.Module, model: nn.Module, weight: Computed, shape: Sequence[int], dims: Mapping[int, Ids]
) -> bool:
    """Put the parametrisation of `weight` in `model` back into `small`, whose weight is cut.

    `shape` is that of the whole weight, `dims` what stays along the dimensions that are cut.
    """
    owner, target = model.get_submodule(weight.path), dict(small.named_modules()).get(weight.path)
    value = getattr(target, weight.leaf, None)
    if target is None or not isinstance(value, Tensor):
        return False
    cut = {name: _cut(tensor, shape, dims) for name, tensor in weight.tensors(owner).items()}
    with torch.no_grad():
        if isinstance(weight.by, ParametrizationList):
            return _restore_list(target, owner, weight, cut, value.detach())
        return _restore_hook(target, owner, weight, cut, value.detach())


def _cut(tensor: Tensor, shape: Sequence[int], dims: Mapping[int, Ids]) -> Tensor:
    """Return what stays of a tensor of a weight of `shape`, along the dimensions in which it is as long."""
    result = tensor.detach().clone()
    for dim, index in dims.items():
        if dim < tensor.dim() and tensor.size(dim) == shape[dim]:
            result = take(result, dim, index)
    return nn.Parameter(result, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result


def _restore_list(
    target: nn.Module, owner: nn.Module, weight: Computed, cut: Mapping[str, Tensor], value: Tensor
) -> bool:
    memo: Memo = {id(tensor): cut[name] for name, tensor in weight.tensors(owner).items()}
    new: Any = copied(weight.by, memo)
    fitting = (_as_it_is, _set_magnitudes, _invert)
    if type(owner).__bases__ != (type_before_parametrizations(target),):
        return False
    if not any(_gives(lambda: copied(new).eval()(), value, partial(way, new, value)) for way in fitting):
        return False
    if not parametrize.is_parametrized(target):
        _parametrise(target, owner)
    lists: Any = target.parametrizations
    (target._parameters if weight.leaf in target._parameters else target._buffers).pop(weight.leaf)
    setattr(type(target), weight.leaf, vars(type(owner))[weight.leaf])
    lists[weight.leaf] = new
    return True


def _parametrise(target: nn.Module, owner: nn.Module) -> None:
    """Give a module the class of a parametrised one, as yet without its properties."""
    kind, lists = type(owner), owner.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    names = set(lists)
    target.__class__ = type(kind.__name__, kind.__bases__, {k: v for k, v in vars(kind).items() if k not in names})
    target.parametrizations = nn.ModuleDict().train(lists.training)


def _as_it_is(new: ParametrizationList, value: Tensor) -> None:
    """Cut like the weight."""


def _set_magnitudes(new: ParametrizationList, value: Tensor) -> None:
    """Set the magnitudes of a weight norm to those of what is left."""
    if isinstance(new[0], _WeightNorm):
        magnitude, direction = dict(new.named_parameters(recurse=False)).values()
        magnitude.data, direction.data = _weight_norm(value, direction, new[0].dim)


def _invert(new: ParametrizationList, value: Tensor) -> None:
    """Set by the parametrisation's own inverse."""
    new.right_inverse(value)


def _weight_norm(value: Tensor, direction: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return magnitude and direction of a weight that has this direction already, whatever its length, or zero.

    With `w = g v / |v|`, the magnitude is `w v / |v|`. `dim` is the dimension with a magnitude for each index, -1 for
    a single one.
    """
    length = torch.norm_except_dim(direction, 2, dim)
    others = [d for d in range(value.dim()) if d != dim]
    along = (value * direction).sum(others, keepdim=dim != -1).reshape(length.shape)
    empty = length == 0
    magnitude = torch.where(empty, torch.zeros_like(length), along / length)
    return magnitude, torch.where(empty, torch.ones_like(direction), direction)


def _restore_hook(target: nn.Module, owner: nn.Module, weight: Computed, cut: dict[str, Tensor], value: Tensor) -> bool:
    kind = kind_of(weight.by)

    def gives(way: Callable[[], object]) -> bool:
        return _gives(lambda: kind.value(weight.by, SimpleNamespace(**cut)), value, way)

    fit = next((way for own, way in _FITS.items() if isinstance(weight.by, own)), None)
    if not gives(lambda: None) and (fit is None or not gives(lambda: fit(weight.by, value, *cut.values()))):
        return False
    del target._parameters[weight.leaf]
    for name, tensor in cut.items():
        if isinstance(tensor, nn.Parameter):
            target.register_parameter(name, tensor)
        else:
            target.register_buffer(name, tensor)
    setattr(target, weight.leaf, kind.value(weight.by, target))
    _put_back(target, owner, weight.by)
    return True


def _put_back(target: nn.Module, owner: nn.Module, hook: Any) -> None:
    """Put back the hooks that belong to a parametrisation, in the places that they had."""
    memo: Memo = {}
    for kind in ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
        there: dict[int, Any] = getattr(target, kind)
        rest = dict(there)
        there.clear()
        for key, one in getattr(owner, kind).items():
            if key in rest:
                there[key] = rest.pop(key)
            elif hook in (one, getattr(one, "fn", None), getattr(getattr(one, "hook", None), "fn", None)):
                there[key] = copy.deepcopy(one, memo)
        there.update(rest)


def _fit_mask(_: Any, value: Tensor, original: Tensor, mask: Tensor) -> None:
    """Let a mask pass what a fold has put in the places of masked weights."""
    changed = value != original * mask
    original[changed] = value[changed]
    mask[changed] = 1


def _fit_magnitudes(hook: Any, value: Tensor, magnitude: Tensor, direction: Tensor) -> None:
    """Set the magnitudes to those of what is left, or of the weight that folds have turned elsewhere."""
    magnitude.data, direction.data = _weight_norm(value, direction, hook.dim)
    if not close(
        hook.compute_weight(SimpleNamespace(**{f"{hook.name}_g": magnitude, f"{hook.name}_v": direction})), value
    ):
        magnitude.data, direction.data = torch.norm_except_dim(value, 2, hook.dim), value.clone()


_FITS: Mapping[type, Callable[..., object]] = {prune.BasePruningMethod: _fit_mask, WeightNorm: _fit_magnitudes}


def _gives(compute: Callable[[], Tensor], value: Tensor, prepare: Callable[[], object]) -> bool:
    """Return whether the parametrisation computes `value` once it is prepared."""
    try:
        prepare()
        return close(compute(), value)
    except Exception as error:  # a stranger's code at a width that it was not made for
        _log.debug("a parametrisation does not fit: %s", error)
        return False


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding."""
    if a.shape != b.shape or not b.is_floating_point():
        return torch.equal(a, b)
    a, b = a.detach(), b.detach()
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool(((a - b).abs() <= 64 * torch.finfo(b.dtype).eps * scale).all())
