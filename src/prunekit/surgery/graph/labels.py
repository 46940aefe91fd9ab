"""Channel labels: an integer tensor beside each activation that names the channel of every element.

A label tensor has the activation's logical shape, with stride 0 along each dimension where the label does not change,
so that it costs a few numbers however large the activation is. Label 0 means "no channel of ours": the input image, a
constant, a mask. What two labels have to do with each other is collected in a `Ledger` as facts (these are one channel;
this one may not go, because ...) and settled once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunekit.surgery.execution.dispatch import broadcast

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]

_NOTHING = torch.zeros((), dtype=torch.int64)


@dataclass
class Ledger:
    """Facts about labels, collected while a network is recorded."""

    count: int = 1  # label 0 is taken: "no channel"
    pairs: list[tuple[Ids, Ids]] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    cuts: list[Ids] = field(default_factory=list)  # equal parts of a tensor, one a row: (parts, channels)
    splits: list[Ids] = field(default_factory=list)  # channels laid out along several dimensions by a view

    def fresh(self, number: int) -> Tensor:
        """`number` labels that nobody has used, shape `(number,)`."""
        start = self.count
        self.count += number
        return torch.arange(start, self.count)

    def unify(self, a: Tensor, b: Tensor, where: str = "the model") -> None:
        """The labels of `a` and `b`, equally shaped, name the same channels element by element.

        A channel that meets an element with no channel of ours (the input, a constant) may not go.
        """
        left, right = ids(a), ids(b)
        if np.array_equal(left, right):
            return
        alone = (left == 0) != (right == 0)
        if alone.any():
            stuck = distinct(np.maximum(left[alone], right[alone]))
            self.frozen.append((stuck, f"an operation in {where} with values that have fixed channels"))
            left, right = left[~alone], right[~alone]
        self.pairs.append((left, right))

    def freeze(self, labels: Tensor, reason: str) -> None:
        """No channel among `labels` may be removed; `reason` says which operation forbids it."""
        present = channels_in(labels)
        if present.size:
            self.frozen.append((present, reason))

    def cut(self, vector: Tensor, parts: int) -> None:
        """`vector` (1-D) is cut into equal parts, as long as each other at any width.

        Channels at the same place of all parts are tied, unless `balance.py` finds that too strict.
        """
        self.cuts.append(self._parts(vector, parts))

    def split(self, vector: Tensor, sizes: Sequence[int]) -> None:
        """`vector` (1-D) is laid out along dimensions of these sizes, of which one follows the width.

        Which one it is shows in what is done there: where everything at an index of one dimension is tied, as it is in
        front of a convolution that reads the others as positions, that one; else the last, as in `cut`.
        """
        parts = math.prod(sizes[:-1])
        if self._parts(vector, parts).shape[1] == sizes[-1]:
            self.splits.append(ids(vector).reshape(tuple(sizes)))
        else:
            self.cut(vector, parts)

    def _parts(self, vector: Tensor, parts: int) -> Ids:
        """The equal parts of a vector, without the places that have no channel of ours in any of them."""
        rows = ids(vector).reshape(parts, -1)
        ours = rows != 0
        alone = ours.any(axis=0) & ~ours.all(axis=0)
        if alone.any():
            stuck = distinct(rows[:, alone])
            self.frozen.append((stuck[stuck != 0], "a cut between channels and values that have fixed channels"))
        return rows[:, ours.all(axis=0)]

    @property
    def stretches(self) -> list[Ids]:
        """All that is cut into equal parts, one part a row: `(parts, channels)`."""
        if not self.splits:
            return self.cuts
        root = settle(self.count, self.pairs)
        open_ = (labels for labels in self.splits if not _an_outer_one_follows(root[labels]))
        return [*self.cuts, *(labels.reshape(-1, labels.shape[-1]) for labels in open_)]

    def ties(self, loose: Mask) -> list[tuple[Ids, Ids]]:
        """Every pair of labels that name one channel; labels in `loose` are not tied by cuts."""
        tied = [rows[:, ~loose[rows[0]]] for rows in self.stretches]
        return [*self.pairs, *((rows[0], row) for rows in tied for row in rows[1:])]

    def tie_blocks(self, vector: Tensor, blocks: int) -> None:
        """Channels at the same place in each of `blocks` equal stretches of `vector` (1-D) live or die together."""
        rows = vector.reshape(blocks, -1)
        for row in rows[1:]:
            self.unify(rows[0], row)

    def tie_along(self, labels: Tensor, dims: Collection[int], where: str) -> None:
        """What lies at different places along `dims`, and at the same place along all others, is one channel."""
        small = compact(labels)
        inner = sorted(d for d in dims if small.size(d) > 1)
        rows = small.movedim(inner, list(range(len(inner)))).reshape(math.prod(small.size(d) for d in inner), -1)
        self.unify(rows[:1].expand(rows.shape), rows, where)


def _an_outer_one_follows(classes: Ids) -> bool:
    """Whether a dimension before the last has a single class at each of its indices."""
    for axis in range(classes.ndim - 1):
        rows = np.moveaxis(classes, axis, 0).reshape(classes.shape[axis], -1)
        if (rows == rows[:, :1]).all():
            return True
    return False


def ids(labels: Tensor) -> Ids:
    """The labels as a flat NumPy array."""
    return labels.numpy().reshape(-1)


def distinct(numbers: Ids) -> Ids:
    """The different numbers in an array, in ascending order."""
    ordered = np.sort(numbers, axis=None)
    new = np.empty(ordered.size, dtype=np.bool_)
    new[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    found: Ids = ordered[new]
    return found


def channels_in(labels: Tensor) -> Ids:
    """The different labels in a tensor, without those that are no channel of ours."""
    present = distinct(ids(compact(labels)))
    return present[1:] if present.size and present[0] == 0 else present


def none_like(shape: Sequence[int]) -> Tensor:
    """Labels of a tensor that carries no channel of ours."""
    return _NOTHING.expand(tuple(shape))


def along(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels of shape `shape` that follow `vector` along `dim` and are constant elsewhere."""
    strides = [0] * len(shape)
    strides[dim] = vector.stride(0)
    assert vector.numel() == shape[dim], (vector.shape, dim, shape)
    return vector.as_strided(tuple(shape), strides)


def widened(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """The labels broadcast to a larger shape."""
    return labels if labels.shape == shape else labels.expand(tuple(shape))


def varying(labels: Tensor) -> frozenset[int]:
    """The dimensions along which the label changes."""
    sizes = labels.shape
    return frozenset([d for d, stride in enumerate(labels.stride()) if stride and sizes[d] > 1])


def compact(labels: Tensor) -> Tensor:
    """One representative along each constant dimension: same rank, small."""
    if labels.numel() == 0:
        return labels.new_zeros([0] * labels.dim())
    return _first_along_others(labels, varying(labels))


def _first_along_others(labels: Tensor, dims: Collection[int]) -> Tensor:
    """The first entry along each dimension that is not among `dims`."""
    sizes = [size if d in dims else 1 for d, size in enumerate(labels.shape)]
    return labels.as_strided(sizes, labels.stride())


def recompact(labels: Tensor) -> Tensor:
    """The same labels with stride 0 along every dimension where the values turn out not to change."""
    shape = labels.shape
    small = compact(labels)
    for d in sorted(varying(small)):
        first = small.narrow(d, 0, 1)
        if (small.numpy() == first.numpy()).all():
            small = first
    return small.expand(shape)


def vector_along(labels: Tensor, dim: int) -> Tensor | None:
    """The labels along `dim` as a vector, or None when they also change along another dimension."""
    if varying(labels) - {dim}:
        labels = recompact(labels)
        if varying(labels) - {dim}:
            return None
    size = labels.size(dim)
    return labels.as_strided((size,), (labels.stride(dim),)) if labels.numel() else labels.new_zeros(size)


def channels_along(ledger: Ledger, labels: Tensor, dim: int, where: str) -> Tensor | None:
    """The labels along `dim` as a vector for what reads all other dimensions as positions: there they are tied.

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


def view_blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the dimensions that a view regroups: runs of equal product, such as `[1] -> [1, 2]` for a split channel.

    Dimensions of size 1 are left out: they carry nothing.
    """
    result = []
    i = j = 0
    while i < len(before) and j < len(after):
        left, right = [i], [j]
        a, b = before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(before):
                a *= before[i]
                left.append(i)
                i += 1
            elif j < len(after):
                b *= after[j]
                right.append(j)
                j += 1
            else:
                break
        result.append(([d for d in left if before[d] != 1], [d for d in right if after[d] != 1]))
    return result


def reshape(ledger: Ledger, labels: Tensor, shape: Sequence[int], where: str) -> Tensor:
    """Labels through a view. A channel dimension that is split ties the blocks it is split into."""
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
        vector = vector_along(labels, left[0]) if len(left) == 1 else None
        if vector is None:
            ledger.freeze(labels, f"a reshape in {where} that mixes channels with other dimensions")
            return none_like(shape)
        ledger.split(vector, [shape[d] for d in right])
    return recompact(labels.reshape(tuple(shape)))


def cat(ledger: Ledger, parts: Sequence[Tensor], dim: int, where: str) -> Tensor:
    """Labels through a concatenation along `dim`; along any other dimension the parts must agree."""
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
    """A class token before image tokens, say: both run through the same channels further on."""
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
    """Labels through an element-wise operation of two tensors, broadcasting as PyTorch does."""
    if a is b:
        return a
    shape = broadcast(a.shape, b.shape)
    assert shape is not None, (a.shape, b.shape)
    wide_a, wide_b = widened(a, shape), widened(b, shape)
    moving_a, moving_b = varying(wide_a), varying(wide_b)
    if not moving_a and not moving_b:
        return _merge_constant(ledger, wide_a, wide_b)
    if not _spans(a, moving_b, len(shape)):
        return _broadcast(ledger, wide_b, a, moving_a, where)
    if not _spans(b, moving_a, len(shape)):
        return _broadcast(ledger, wide_a, b, moving_b, where)
    union = moving_a | moving_b
    small_a, small_b = _first_along_others(wide_a, union), _first_along_others(wide_b, union)
    ledger.unify(small_a, small_b, where)
    small = small_a if ids(small_a).all() else torch.where(small_a != 0, small_a, small_b)
    return small.expand(tuple(shape))


def _spans(labels: Tensor, dims: Iterable[int], rank: int) -> bool:
    """Whether a tensor has more than one element along any of `dims` (counted in the broadcast shape)."""
    shift = rank - labels.dim()
    sizes = [labels.size(d - shift) if d >= shift else 1 for d in dims]
    return not sizes or any(size > 1 for size in sizes)


def _merge_constant(ledger: Ledger, a: Tensor, b: Tensor) -> Tensor:
    left, right = compact(a).reshape(-1)[:1], compact(b).reshape(-1)[:1]
    if left.numel() and int(left) and int(right):
        ledger.unify(left, right)
    return a if left.numel() and int(left) else b


def _broadcast(ledger: Ledger, wide: Tensor, scalar: Tensor, scalar_moves: frozenset[int], where: str) -> Tensor:
    """One operand has a single element where the other has channels: it applies to all of them alike."""
    if scalar_moves:
        ledger.freeze(wide, f"an outer product of channels in {where}")
        ledger.freeze(scalar, f"an outer product of channels in {where}")
        return none_like(wide.shape)
    ledger.freeze(scalar, f"a single channel that is spread over others in {where}")
    return wide


def settle(count: int, pairs: Sequence[tuple[Ids, Ids]]) -> Ids:
    """Connected components: for each of `count` labels the smallest label it is joined with, shape `(count,)`."""
    parent = np.arange(count, dtype=np.int64)
    if not pairs:
        return parent
    a = np.concatenate([np.asarray(p[0]) for p in pairs])
    b = np.concatenate([np.asarray(p[1]) for p in pairs])
    while True:
        left, right = parent[a], parent[b]
        apart = left != right
        if not apart.any():
            return parent
        a, b, left, right = a[apart], b[apart], left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
        while True:
            jumped = parent[parent]
            if np.array_equal(jumped, parent):
                break
            parent = jumped
