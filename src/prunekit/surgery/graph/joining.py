"""Labels of what operations make of several tensors, or of one in another shape, and the facts that follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from prunekit.surgery.execution.dispatch import broadcast
from prunekit.surgery.graph.labels import (
    _first_along_others,
    along,
    compact,
    ids,
    none_like,
    recompact,
    varying,
    vector_along,
    view_blocks,
    widened,
)
from prunekit.surgery.graph.ledger import Ledger


def channels_along(ledger: Ledger, labels: Tensor, dim: int, where: str) -> Tensor | None:
    """Return the labels along `dim` as a vector, for what reads all other dimensions as positions: there they are tied.

    None when the labels change along other dimensions alone.
    """
    vector = vector_along(labels, dim)
    if vector is not None:
        return vector
    labels = recompact(labels)
    moving = varying(labels)
    if dim not in moving:
        return None
    ledger.tie_along(labels, moving - {dim}, where)
    return vector_along(_first_along_others(labels, {dim}), dim)


def collapsed(ledger: Ledger, labels: Tensor, dims: Iterable[int], where: str, *, whole: bool = False) -> Tensor:
    """Return the labels with what lies along `dims` tied, for what needs these dimensions whole.

    Where labels change along others too (the heads of attention), one of each of those stays or goes as a whole; with
    `whole` only while heads go whole.
    """
    gone = varying(labels) & frozenset(dims)
    if not gone:
        return labels
    ledger.tie_along(labels, gone, where, whole=whole)
    kept = frozenset(range(labels.dim())) - gone
    return _first_along_others(labels, kept).expand(labels.shape)


def reshape(ledger: Ledger, labels: Tensor, shape: Sequence[int], where: str) -> Tensor:
    """Return the labels of a view. A channel dimension that is split ties the blocks it is split into.

    What channels there are along other dimensions then goes with them.
    """
    if labels.numel() == 0 or math.prod(shape) != labels.numel():
        ledger.freeze(labels, f"a view with another number of elements in {where}")
        return none_like(shape)
    moving = varying(labels)
    if not moving:
        return compact(labels).reshape(-1)[0].expand(tuple(shape))
    for left, right in view_blocks(labels.shape, shape):
        touched = moving.intersection(left)
        if not touched or len(right) <= 1:
            continue
        if len(left) == 1 and _repeats(labels, left[0], shape[right[-1]]):
            continue
        if len(left) == 1:
            labels = collapsed(ledger, labels, moving - touched, where)
        vector = vector_along(labels, left[0]) if len(left) == 1 else None
        if vector is None:
            ledger.freeze(labels, f"a reshape in {where} that mixes channels with other dimensions")
            return none_like(shape)
        ledger.split(vector, [shape[d] for d in right])
    return recompact(labels.reshape(tuple(shape)))


def _repeats(labels: Tensor, dim: int, size: int) -> bool:
    """Return whether labels along `dim` start again after every `size` of them: the same heads for each image."""
    stretches = compact(labels).movedim(dim, 0).reshape(labels.size(dim) // size, -1)
    return bool((stretches == stretches[:1]).all())


def cat(ledger: Ledger, parts: Sequence[Tensor], dim: int, where: str) -> Tensor:
    """Return the labels of a concatenation along `dim`; along any other dimension the parts must agree."""
    moving = [varying(part) for part in parts]
    others = frozenset[int]().union(*moving) - {dim}
    if others and not all(dim in own for own in moving if own):
        return _cat_coupled(ledger, parts, dim, where)
    shape = list(parts[0].shape)
    shape[dim] = sum(part.size(dim) for part in parts)
    vector = torch.cat([_line(ledger, part, dim, where) for part in parts])
    return recompact(along(vector, dim, shape))


def _line(ledger: Ledger, part: Tensor, dim: int, where: str) -> Tensor:
    vector = channels_along(ledger, part, dim, where)
    assert vector is not None
    return vector


def _cat_coupled(ledger: Ledger, parts: Sequence[Tensor], dim: int, where: str) -> Tensor:
    """Return the labels of a concatenation whose parts run through the same channels further on: a class token, say."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.size(dim) for part in parts)
    if any(dim in varying(part) for part in parts):
        for part in parts:
            ledger.freeze(part, f"a concatenation across channels in {where}")
        return none_like(shape)
    first = parts[0].narrow(dim, 0, 1)
    for part in parts[1:]:
        merge(ledger, first, part.narrow(dim, 0, 1), where)
    return first.expand(shape)


def merge(ledger: Ledger, a: Tensor, b: Tensor, where: str) -> Tensor:
    """Return the labels of an element-wise operation of two tensors, broadcasting as PyTorch does."""
    if a is b:
        return a
    shape = broadcast(a.shape, b.shape)
    assert shape is not None, (a.shape, b.shape)
    wide_a, wide_b = widened(a, shape), widened(b, shape)
    moving_a, moving_b = varying(wide_a), varying(wide_b)
    if not moving_a and not moving_b:
        return _merge_constant(ledger, wide_a, wide_b)
    for one, moving, other in ((wide_a, moving_a, b), (wide_b, moving_b, a)):
        fixed = _fixed_along(ledger, other, moving, len(shape))
        if fixed is not None:
            ledger.freeze(other, f"values in {where} that several channels share")
            return collapsed(ledger, one, fixed, where)
    if not _spans(a, moving_b, len(shape)):
        return _broadcast(ledger, wide_b, a, moving_a, where)
    if not _spans(b, moving_a, len(shape)):
        return _broadcast(ledger, wide_a, b, moving_b, where)
    union = moving_a | moving_b
    small_a, small_b = _first_along_others(wide_a, union), _first_along_others(wide_b, union)
    ledger.unify(small_a, small_b, where)
    small = small_a if ids(small_a).all() else torch.where(small_a != 0, small_a, small_b)
    return small.expand(tuple(shape))


def _fixed_along(ledger: Ledger, labels: Tensor, dims: frozenset[int], rank: int) -> frozenset[int] | None:
    """Return those of `dims` along which values have a size of their own, though they are the same along others of
    them: angles of rotary positions, for all heads. None for values that a layer has made, or that differ everywhere.
    """
    shift = rank - labels.dim()
    own = frozenset(d for d in dims if d >= shift and labels.size(d - shift) > 1)
    if own == dims or not (own or varying(labels)) or not ledger.is_given(labels):
        return None
    return own


def _spans(labels: Tensor, dims: Iterable[int], rank: int) -> bool:
    """Return whether a tensor has more than one element along any of `dims` (counted in the broadcast shape)."""
    shift = rank - labels.dim()
    sizes = [labels.size(d - shift) if d >= shift else 1 for d in dims]
    return not sizes or any(size > 1 for size in sizes)


def _merge_constant(ledger: Ledger, a: Tensor, b: Tensor) -> Tensor:
    left, right = compact(a).reshape(-1)[:1], compact(b).reshape(-1)[:1]
    if left.numel() and int(left) and int(right):
        ledger.unify(left, right)
    return a if left.numel() and int(left) else b


def _broadcast(ledger: Ledger, wide: Tensor, scalar: Tensor, scalar_moves: frozenset[int], where: str) -> Tensor:
    """Broadcast an operand that has a single element where the other has channels: it applies to all of them alike."""
    if scalar_moves:
        ledger.freeze(wide, f"an outer product of channels in {where}")
        ledger.freeze(scalar, f"an outer product of channels in {where}")
        return none_like(wide.shape)
    ledger.freeze(scalar, f"a single channel that is spread over others in {where}")
    return wide
