"""Channel labels: an integer tensor beside each activation that names the channel of every element.

A label tensor has the activation's logical shape, with stride 0 along each dimension where the label does not change,
so that it costs a few numbers however large the activation is. Label 0 means "no channel of ours": the input image, a
constant, a mask. What two labels have to do with each other is collected in a `Ledger` as facts (these are one channel;
this one may not go, because ...) and settled once, at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]

_NOTHING = torch.zeros((), dtype=torch.int64)


def ids(labels: Tensor) -> Ids:
    """Return the labels as a flat NumPy array."""
    return labels.numpy().reshape(-1)


def distinct(numbers: Ids) -> Ids:
    """Return the different numbers in an array, in ascending order."""
    ordered = np.sort(numbers, axis=None)
    new = np.empty(ordered.size, dtype=np.bool_)
    new[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    found: Ids = ordered[new]
    return found


def channels_in(labels: Tensor) -> Ids:
    """Return the different labels in a tensor, without those that are no channel of ours."""
    present = distinct(ids(compact(labels)))
    return present[1:] if present.size and present[0] == 0 else present


def none_like(shape: Sequence[int]) -> Tensor:
    """Return the labels of a tensor that carries no channel of ours."""
    return _NOTHING.expand(tuple(shape))


def along(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Return labels of shape `shape` that follow `vector` along `dim` and are constant elsewhere."""
    strides = [0] * len(shape)
    strides[dim] = vector.stride(0)
    assert vector.numel() == shape[dim], (vector.shape, dim, shape)
    return vector.as_strided(tuple(shape), strides)


def widened(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the labels broadcast to a larger shape."""
    return labels if labels.shape == shape else labels.expand(tuple(shape))


def varying(labels: Tensor) -> frozenset[int]:
    """Return the dimensions along which the label changes."""
    sizes = labels.shape
    return frozenset([d for d, stride in enumerate(labels.stride()) if stride and sizes[d] > 1])


def compact(labels: Tensor) -> Tensor:
    """Return one representative along each constant dimension: same rank, small."""
    if labels.numel() == 0:
        return labels.new_zeros([0] * labels.dim())
    return _first_along_others(labels, varying(labels))


def _first_along_others(labels: Tensor, dims: Collection[int]) -> Tensor:
    """Return the first entry along each dimension that is not among `dims`."""
    sizes = [size if d in dims else 1 for d, size in enumerate(labels.shape)]
    return labels.as_strided(sizes, labels.stride())


def recompact(labels: Tensor) -> Tensor:
    """Return the same labels with stride 0 along every dimension where the values turn out not to change."""
    shape = labels.shape
    small = compact(labels)
    for d in sorted(varying(small)):
        first = small.narrow(d, 0, 1)
        if (small.numpy() == first.numpy()).all():
            small = first
    return small.expand(shape)


def vector_along(labels: Tensor, dim: int) -> Tensor | None:
    """Return the labels along `dim` as a vector, or None when they also change along another dimension."""
    if varying(labels) - {dim}:
        labels = recompact(labels)
        if varying(labels) - {dim}:
            return None
    size = labels.size(dim)
    return labels.as_strided((size,), (labels.stride(dim),)) if labels.numel() else labels.new_zeros(size)


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


def settle(count: int, pairs: Sequence[tuple[Ids, Ids]]) -> Ids:
    """Return connected components: for each of `count` labels the smallest it is joined with, shape `(count,)`."""
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
