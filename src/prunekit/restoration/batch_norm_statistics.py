"""Batch-norm statistics: what a network's are on given images, and a pruned network's moved by how it differs there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.errors import InputError
from prunekit.plan import Plan, Refit
from prunekit.progress import counter
from prunekit.surgery import Graph, edit, resolve
from prunekit.surgery.copying import copied
from prunekit.surgery.execution.hooks import hooked


def norms_of(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield the batch norms that hold running statistics, by name."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def aligned(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy whose norms hold the statistics of `images` `(N, C, H, W)`: each sees what it was made to give."""
    subject = copied(model).eval()
    norms, count, passed = [norm for _, norm in norms_of(subject)], counter("measuring batch norms"), 0

    def note(*_: object) -> None:
        nonlocal passed
        passed += 1
        count(passed, len(norms))

    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad(), hooked(norm.register_forward_hook(note) for norm in norms):
        subject(images)
    for norm in norms:
        norm.eval()
    return subject


def refit_norms(model: nn.Module, graph: Graph, plan: Plan, images: Tensor) -> Plan:
    """Return `plan`, with running statistics moved by how those of the two networks differ on `images`.

    Both are measured on the same images, so few of them suffice: what is a matter of the sample is in both.

    Raises:
        InputError: a single image.
    """
    if len(images) < 2:
        raise InputError("batch-norm statistics cannot be estimated on a single image", hint="pass a few hundred")
    small = edit(model, plan, graph)
    before, after = dict(norms_of(aligned(model, images))), dict(norms_of(aligned(small, images)))
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
