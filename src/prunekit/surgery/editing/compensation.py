"""The arithmetic of `Fold`: a consumer takes over what its removed inputs would have told it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import SurgeryError
from prunekit.plan import Fold
from prunekit.surgery.copying import named_tensors
from prunekit.surgery.editing.carriers import CarrierFinder
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.groups import Member
from prunekit.surgery.graph.labels import Mask
from prunekit.surgery.graph.recording import WeightRead
from prunekit.surgery.graph.resolved import ResolvedPlan


def folded(model: nn.Module, resolved: ResolvedPlan) -> dict[str, Tensor]:
    """Return new full-width values of every parameter and buffer that the folds of a plan change.

    A name that the model does not have is a bias to be made.

    Raises:
        SurgeryError: a fold that names no consumer of its group, has the wrong shape, holds a constant for an input
            that stays, or one that the consumer's operation cannot carry.
    """
    graph, folds = resolved.graph, resolved.plan.folds
    if not folds:
        return {}
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}
    # Offsets read the original weights: they are what the removed channels were worth before any merging.
    changed: dict[str, Tensor] = {}
    carriers = CarrierFinder(model, graph)
    for fold in folds:
        if fold.offset is not None:
            _absorb(fold, graph, carriers, resolved.kept, tensors, changed)
    for fold in folds:
        if fold.matrix is not None:
            kept = resolved.keeps.get(graph.group(fold.group).name)
            if kept is not None:
                _merge(fold, graph, kept, tensors, changed)
    return changed


def reader(fold: Fold, graph: Graph) -> Member:
    """Return the member of the fold's group through which the consumer of the fold reads.

    Raises:
        SurgeryError: it does not read that group, or through both dimensions of one weight.
    """
    group, weight = graph.group(fold.group), graph.weight_at(fold.consumer)
    number = graph.number(group.name)
    dims = {node.read.dim for node in graph.reads(weight) if node.read is not None}
    dims |= {dim for (name, dim), role in graph.roles.items() if name == weight and role == "in"}
    found = []
    for dim in sorted(dims):
        classes = graph.slots.get((weight, dim))
        positions = np.flatnonzero(graph.group_of[classes] == number) if classes is not None else np.empty(0, int)
        if classes is not None and positions.size:
            found.append(Member(weight, dim, positions, graph.unit_of[classes[positions]]))
    if len(found) == 1:
        return found[0]
    known = ", ".join(dict.fromkeys(graph.address(member.parameter) for member in group.consumers)) or "none"
    how = "reads channel group '{}' through both of its dimensions" if found else "does not read channel group '{}'"
    raise SurgeryError(f"'{fold.consumer}' {how.format(group.name)}", hint=f"its consumers: {known}")


def _merge(
    fold: Fold, graph: Graph, kept: tuple[int, ...], tensors: Mapping[str, Tensor], changed: dict[str, Tensor]
) -> None:
    """Apply `W_k += W_r A` for every place that a unit has in the consumer (a flatten gives it several)."""
    member, group = reader(fold, graph), graph.group(fold.group)
    removed = sorted(set(range(group.size)) - set(kept))
    assert fold.matrix is not None
    if tuple(fold.matrix.shape) != (len(removed), len(kept)):
        raise SurgeryError(
            f"the fold of '{fold.consumer}' has shape {tuple(fold.matrix.shape)}; "
            f"{len(removed)} removed and {len(kept)} kept channels need {(len(removed), len(kept))}"
        )
    if any(node.read is not None and node.read.dim != member.dim for node in graph.reads(member.parameter)):
        raise SurgeryError(f"'{fold.consumer}' cannot be merged: the same weight makes other channels elsewhere")
    places = places_of(member, group.size)
    weight = changed.get(member.parameter, tensors[member.parameter]).clone()
    columns = weight.movedim(member.dim, -1)
    matrix = fold.matrix.to(weight)
    from_removed = columns[..., torch.from_numpy(places[removed])]  # (..., removed, places)
    columns[..., torch.from_numpy(places[list(kept)])] += torch.einsum("...rp,rk->...kp", from_removed, matrix)
    changed[member.parameter] = weight


def places_of(member: Member, size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return the places of each unit along the member's dimension, shape `(size, places per unit)`.

    Raises:
        SurgeryError: the units have unequal numbers of places.
    """
    counts = np.bincount(member.units, minlength=size)
    if counts.min() != counts.max():
        raise SurgeryError(f"'{member.module}' reads some channels of a group more often than others")
    order = np.argsort(member.units, kind="stable")
    return member.positions[order].reshape(size, int(counts[0]))


def _absorb(
    fold: Fold,
    graph: Graph,
    carriers: CarrierFinder,
    stays: Mask,
    tensors: Mapping[str, Tensor],
    changed: dict[str, Tensor],
) -> None:
    """Absorb the constant part of a fold: a shift of each output, put where it costs nothing."""
    member = reader(fold, graph)
    found = carriers.of(member.parameter, member.dim)
    if found.reason is not None:
        raise SurgeryError(f"'{fold.consumer}' cannot take over constants: {found.reason}")
    assert fold.offset is not None
    shift = output_shift(tensors[member.parameter], fold.offset, found.read)
    inputs = torch.from_numpy(stays[graph.slots[member.parameter, member.dim]])
    if bool(fold.offset.cpu().reshape(-1, len(inputs))[:, inputs].any()):
        raise SurgeryError(f"the fold of '{fold.consumer}' holds constants for inputs that stay; they must be zero")
    for target, sign in found.targets.items():
        start = changed.get(target, tensors.get(target, torch.zeros_like(shift)))
        changed[target] = start + sign * shift.reshape(start.shape)


def output_shift(weight: Tensor, offset: Tensor, read: WeightRead) -> Tensor:
    """Return what constants on the inputs add to each output channel, borders apart: shape `(outputs,)`.

    `offset` has one entry for each input channel of the layer, all groups of a grouped convolution included.

    Raises:
        SurgeryError: `offset` has another length.
    """
    if not read.stride:  # a product of matrices: the other dimensions of the weight are of size one, save the outputs'
        rows, groups = weight.movedim(read.dim, -1).flatten(0, -2), 1
    else:
        rows, groups = weight.flatten(2).sum(-1), read.groups
        if read.transposed:  # (inputs, outputs of a group) -> (outputs, inputs of a group)
            rows = rows.reshape(groups, -1, rows.size(1)).transpose(1, 2).flatten(0, 1)
    inputs = groups * rows.size(1)
    if offset.numel() != inputs:
        raise SurgeryError(f"'{read.parameter}' has {inputs} inputs; the fold's offset has {offset.numel()}")
    by_group = rows.reshape(groups, -1, rows.size(1))
    blocks = offset.to(rows).reshape(groups, -1, 1)
    return torch.bmm(by_group, blocks).reshape(-1)
