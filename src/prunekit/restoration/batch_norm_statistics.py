"""Batch-norm statistics of a pruned network, moved by how it differs from the original on given images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.errors import InputError
from prunekit.nn.norms import norms_of
from prunekit.plan import Plan, Refit
from prunekit.restoration.images import Inputs
from prunekit.restoration.norm_alignment import aligned
from prunekit.surgery import Graph, edit, resolve


def refit_norms(model: nn.Module, graph: Graph, plan: Plan, images: Tensor | Inputs) -> Plan:
    """Return `plan`, with running statistics moved by how those of the two networks differ on `images`.

    Both are measured on the same images, so few of them suffice: what is a matter of the sample is in both.

    Raises:
        InputError: a single image.
    """
    if len(images) < 2:
        raise InputError("batch-norm statistics cannot be estimated on a single image", hint="pass a few hundred")
    small = edit(model, plan, graph)
    before, after = (dict(norms_of(aligned(one, graph, images))) for one in (model, small))
    stays = resolve(graph, plan).indices
    refits = []
    for name, norm in norms_of(model):
        if name not in after:  # behind a selection that surgery has put in
            continue
        index = stays.get((f"{name}.running_mean", 0))
        values = [_statistics(one) for one in (norm, before[name], after[name])]
        if index is not None:
            kept = torch.from_numpy(index).to(values[0][0].device)
            values[:2] = [(mean[kept], variance[kept]) for mean, variance in values[:2]]
        (mean, variance), (old_mean, old_variance), (new_mean, new_variance) = values
        ratio = (new_variance + norm.eps) / (old_variance + norm.eps)
        refits.append(Refit(name, {"running_mean": mean + new_mean - old_mean, "running_var": variance * ratio}))
    return Plan([*plan.operations, *refits], {**plan.notes, "refit_bn": len(refits)}, plan.example)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var
