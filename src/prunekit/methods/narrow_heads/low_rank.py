"""The best approximations of products of two projections by ones of lower rank, from Gram matrices.

With `A` and `B` of shape `(width, inputs)`, `A^T B` has the same value for `S A` and `S^-T B`. Its singular values say
how much each coordinate of the right basis matters; cut off after `m` of them it is the best approximation of rank `m`
in the Frobenius norm (Eckart and Young, Psychometrika 1936). That of queries and keys is the mean squared error of the
scores for independent inputs of unit covariance, such as a layer norm gives.
"""

from __future__ import annotations

import torch
from torch import Tensor


def joint_basis(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how the coordinates of two projections turn into those of their product's singular vectors.

    Args:
        left: Gram matrices `A A^T` of one or several projections that meet the same right one, `(heads, width, width)`.
        right: That of the right one, `B B^T`, `(width, width)`.

    Returns:
        Matrices `T` for each left one, `(heads, width, width)`, and for the right one, and the singular values,
        descending: rows `i` of `T A` and `T B` multiply to the `i`-th part of `A^T B`.
    """
    roots, inverses = _roots(left)
    root, inverse = _roots(right)
    u, values, v = torch.linalg.svd((roots @ root).flatten(0, 1), full_matrices=False)
    scale = values.sqrt().unsqueeze(1)
    parts = u.unflatten(0, (left.size(0), -1)).transpose(-2, -1)
    return scale * parts @ inverses, scale * v @ inverse, values


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square roots of Gram matrices, and their pseudo-inverses."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    least = values.amax(-1, keepdim=True) * 1e-12
    roots = values.sqrt().unsqueeze(-2)
    inverses = torch.where(values > least, values.clamp(min=1e-300).rsqrt(), 0).unsqueeze(-2)
    return (vectors * roots) @ vectors.transpose(-2, -1), (vectors * inverses) @ vectors.transpose(-2, -1)
