"""Neuron Merging's compensation (Kim et al., NeurIPS 2020): each removed filter is a multiple of one kept filter.

`W ~ Z Y` with `Y` the kept filters and `Z` one non-zero a row; a non-negative `Z` passes through ReLU and pooling, so
the next layer takes it over. The arithmetic of the batch-norm form is that of the authors' release, in which `sigma`
stands for the stored running variance: their published numbers are its proof.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SILENT = 1e-12  # a gamma below this scales nothing
# On the paper's networks no scale exceeds 3. One of 10 means a removed gamma near zero: a channel that is nearly
# constant, as sparsity training makes them, and that no multiple of another can stand for.
_LARGEST_SCALE = 10.0


@dataclass(frozen=True)
class BatchNormStatistics:
    """Scale, shift, running mean and running variance of a batch norm, each `(C,)`.

    The last two are None where it always takes those of the batch.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor | None
    variance: Tensor | None


@dataclass(frozen=True)
class Scaling:
    """`A`, the rows of `Z` for the removed filters, `(removed, kept)`, and how many merges have a negative scale."""

    matrix: Tensor
    merged: int
    negative: int


def scaling_linear(filters: Tensor, kept: Tensor, removed: Tensor, threshold: float) -> Scaling:
    """Merge by cosine alone, for layers without batch norm (algorithm 1 of the paper).

    `filters` is `(C, fan-in)`, the bias appended where there is one; the scale is the ratio of the norms.
    """
    cosine, ratio = _compare(filters, kept, removed)
    best = cosine.argmax(dim=1)
    allowed = _take(cosine, best) >= threshold if threshold else torch.ones_like(best, dtype=torch.bool)
    return _scaling(best, _take(ratio, best), allowed, kept.numel())


def scaling_batch_norm(
    filters: Tensor, norm: BatchNormStatistics, kept: Tensor, removed: Tensor, threshold: float, lam: float
) -> Scaling:
    """Merge by cosine and bias distance, for layers followed by batch norm (section 3.3 of the paper).

    Minimises `lam (1 - cos) + (1 - lam) minmax(d)` over the kept filters. A removed channel with `gamma = 0` is a
    constant and merges with nothing, nor does one whose scale runs away because its gamma is almost zero; a kept one
    with `gamma = 0` is no candidate.
    """
    cosine, ratio = _compare(filters, kept, removed)
    gamma_i, beta_i = (v[removed].unsqueeze(1) for v in (norm.gamma, norm.beta))
    gamma_j, beta_j = (v[kept].unsqueeze(0) for v in (norm.gamma, norm.beta))
    if norm.mean is None or norm.variance is None:  # whatever the filters' norms, each is brought to the same
        scale = gamma_i / gamma_j
        shift = beta_i - scale * beta_j
    else:
        mean_i, var_i = (v[removed].unsqueeze(1) for v in (norm.mean, norm.variance))
        mean_j, var_j = (v[kept].unsqueeze(0) for v in (norm.mean, norm.variance))
        scale = ratio * (gamma_j / gamma_i) * (var_i / var_j)
        shift = gamma_j / var_j * (ratio * (-(var_i * beta_i / gamma_i) + mean_i) - mean_j) + beta_j
    usable = (gamma_j.abs() > _SILENT) & (gamma_i.abs() > _SILENT) & torch.isfinite(scale) & torch.isfinite(shift)
    distance = torch.where(usable, shift.abs() / scale, torch.inf)
    score = lam * (1 - cosine) + (1 - lam) * _min_max(distance, usable)
    best = torch.where(usable, score, torch.inf).argmin(dim=1)
    allowed = _take(usable, best) & (_take(scale, best).abs() <= _LARGEST_SCALE)
    if threshold:
        allowed = allowed & (_take(cosine, best) >= threshold)
    return _scaling(best, _take(scale, best), allowed, kept.numel())


def _compare(filters: Tensor, kept: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine similarity and ratio of norms of each removed filter with each kept one, `(removed, kept)`."""
    flat = filters.flatten(1).double()
    norms = flat.norm(dim=1)
    unit = flat / norms.clamp_min(1e-30).unsqueeze(1)
    ratio = norms[removed].unsqueeze(1) / norms[kept].clamp_min(1e-30).unsqueeze(0)
    return unit[removed] @ unit[kept].t(), ratio


def _min_max(distance: Tensor, usable: Tensor) -> Tensor:
    """Return each row scaled to `[0, 1]` over its usable entries; zero where they are equal (one kept channel)."""
    low = torch.where(usable, distance, torch.inf).amin(dim=1, keepdim=True)
    high = torch.where(usable, distance, -torch.inf).amax(dim=1, keepdim=True)
    span = high - low
    return torch.where(usable & (span > 0), (distance - low) / span, 0.0)


def _take(matrix: Tensor, column: Tensor) -> Tensor:
    return matrix.gather(1, column.unsqueeze(1)).squeeze(1)


def _scaling(best: Tensor, scale: Tensor, allowed: Tensor, kept: int) -> Scaling:
    matrix = torch.zeros(best.numel(), kept, dtype=torch.float64)
    rows = allowed.nonzero().squeeze(1)
    matrix[rows, best[rows]] = scale[rows]
    return Scaling(matrix, int(allowed.sum()), int((allowed & (scale < 0)).sum()))
