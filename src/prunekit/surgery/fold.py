"""The arithmetic of `Fold`: a consumer takes over what its removed inputs would have told it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import SurgeryError
from prunekit.plan import Fold, Plan
from prunekit.surgery.graph import Graph, resolve
from prunekit.surgery.groups import Member


def folded(model: nn.Module, plan: Plan, graph: Graph) -> dict[str, Tensor]:
    """New full-width values of every parameter and buffer that the folds of `plan` change.

    A name that the model does not have is a bias to be made.

    Raises:
        SurgeryError: a fold that names no consumer of its group, or has the wrong shape, or nowhere to put a constant.
    """
    if not plan.folds:
        return {}
    keeps = resolve(graph, plan)
    tensors = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    # Offsets read the original weights: they are what the removed channels were worth before any merging.
    changed: dict[str, Tensor] = {}
    for fold in plan.folds:
        if fold.offset is not None:
            _absorb(fold, graph, tensors, changed)
    for fold in plan.folds:
        if fold.matrix is not None:
            kept = keeps.get(graph.group(fold.group).name)
            if kept is not None:
                _merge(fold, graph, kept, tensors, changed)
    return changed


def _consumer(fold: Fold, graph: Graph) -> Member:
    group = graph.group(fold.group)
    for member in group.consumers:
        if member.module == fold.consumer:
            return member
    known = ", ".join(sorted({member.module for member in group.consumers}))
    raise SurgeryError(f"'{fold.consumer}' does not read channel group '{group.name}'", hint=f"its consumers: {known}")


def _merge(
    fold: Fold, graph: Graph, kept: tuple[int, ...], tensors: Mapping[str, Tensor], changed: dict[str, Tensor]
) -> None:
    """`W_k += W_r A`, for every place that a unit has in the consumer (a flatten gives it several)."""
    member, group = _consumer(fold, graph), graph.group(fold.group)
    removed = sorted(set(range(group.size)) - set(kept))
    assert fold.matrix is not None
    if tuple(fold.matrix.shape) != (len(removed), len(kept)):
        raise SurgeryError(
            f"the fold of '{fold.consumer}' has shape {tuple(fold.matrix.shape)}; "
            f"{len(removed)} removed and {len(kept)} kept channels need {(len(removed), len(kept))}"
        )
    places = places_of(member, group.size)
    weight = changed.get(member.parameter, tensors[member.parameter]).clone()
    columns = weight.movedim(member.dim, -1)
    matrix = fold.matrix.to(weight)
    from_removed = columns[..., torch.from_numpy(places[removed])]  # (..., removed, places)
    columns[..., torch.from_numpy(places[list(kept)])] += torch.einsum("...rp,rk->...kp", from_removed, matrix)
    changed[member.parameter] = weight


def places_of(member: Member, size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Where each unit sits along the member's dimension, shape `(size, places per unit)`.

    Raises:
        SurgeryError: the units have unequal numbers of places.
    """
    counts = np.bincount(member.units, minlength=size)
    if counts.min() != counts.max():
        raise SurgeryError(f"'{member.module}' reads some channels of a group more often than others")
    order = np.argsort(member.units, kind="stable")
    return member.positions[order].reshape(size, int(counts[0]))


def _absorb(fold: Fold, graph: Graph, tensors: Mapping[str, Tensor], changed: dict[str, Tensor]) -> None:
    """The constant part: a shift of each output, put where it costs nothing."""
    member = _consumer(fold, graph)
    assert fold.offset is not None
    shift = output_shift(tensors[member.parameter], fold.offset, member)
    bias = f"{member.module}.bias" if member.module else "bias"
    norm = graph.batch_norm_after(member.module)
    target, sign = (bias, 1.0) if bias in tensors or norm is None else (f"{norm}.running_mean", -1.0)
    start = changed.get(target, tensors.get(target, torch.zeros_like(shift)))
    changed[target] = start + sign * shift


def output_shift(weight: Tensor, offset: Tensor, member: Member) -> Tensor:
    """What constants on the inputs add to each output channel, borders apart: shape `(outputs,)`.

    `offset` has one entry for each input channel of the layer, all groups of a grouped convolution included.

    Raises:
        SurgeryError: `offset` has another length.
    """
    rows = weight.movedim(member.dim, 1).flatten(2).sum(-1) if weight.dim() > 2 else weight.movedim(member.dim, 1)
    groups, rest = divmod(offset.numel(), rows.size(1))
    if rest or rows.size(0) % groups:
        raise SurgeryError(f"'{member.module}' has {rows.size(1)} inputs; the fold's offset has {offset.numel()}")
    by_group = rows.reshape(groups, -1, rows.size(1))
    blocks = offset.to(rows).reshape(groups, -1, 1)
    return torch.bmm(by_group, blocks).reshape(-1)
