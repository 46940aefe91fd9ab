"""The folds of Neuron Merging for the groups that a plan narrows, from the original weights and the kept filters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.plan import Fold, Plan
from prunekit.restoration.makers import Maker, maker_of, norm_after, obstacle_to_making_up
from prunekit.restoration.paper import BatchNormStatistics, Scaling, scaling_batch_norm, scaling_linear
from prunekit.restoration.paper_path import Path, behind_late_norm, obstacle_to_late_norm, path_of
from prunekit.restoration.plain_layers import reads
from prunekit.surgery import ChannelGroup, Graph, resolve
from prunekit.surgery.editing.compensation import places_of


def obstacle_to_folds(model: nn.Module, graph: Graph, group: ChannelGroup) -> str | None:
    """Return why the layers behind a group cannot read multiples of other channels, or None."""
    reason = obstacle_to_making_up(model, graph, group)
    if reason is not None:
        return reason
    path = _path(graph, group)
    if path.late is not None and path.blocks is None:
        return obstacle_to_late_norm(model, graph, group, path.late)
    return path.blocks


def paper_folds(
    model: nn.Module, graph: Graph, plan: Plan, groups: Iterable[str], threshold: float, lam: float
) -> Plan:
    """Return the plan with folds for these of its groups, in the place of other folds of theirs."""
    keeps, merged, negative = resolve(graph, plan).keeps, 0, 0
    folds: list[Fold] = []
    names = set(groups)
    for name in (name for name in keeps if name in names):
        maker = maker_of(model, graph, graph.group(name))
        assert isinstance(maker, Maker)
        scaling = _scaling(model, graph, maker, keeps[name], threshold, lam)
        merged, negative = merged + scaling.merged, negative + scaling.negative
        folds += _folds(model, graph, maker, scaling, keeps[name])
    others = [op for op in plan if not (isinstance(op, Fold) and graph.group(op.group).name in names)]
    notes = {**plan.notes, "merged": merged, "negative_scales": negative}
    return Plan([*others, *folds], notes, plan.example)


def _path(graph: Graph, group: ChannelGroup) -> Path:
    """Return the way from the group's layer to its consumers, of all its calls: the first blocked one, or the last."""
    consumers = {member.parameter for member in group.consumers}
    maker = group.producers[0].module
    found = [path_of(graph, call, consumers) for call in reads(graph, maker)]
    if not found:
        return Path(f"'{maker}' runs in training alone")
    return next((path for path in found if path.blocks), found[-1])


def _scaling(
    model: nn.Module, graph: Graph, maker: Maker, kept: Sequence[int], threshold: float, lam: float
) -> Scaling:
    stay, go = torch.tensor(kept), torch.tensor(_gone(maker.group, kept))
    filters = maker.weight.cpu().double().flatten(1)
    norm = norm_after(model, graph, maker.member.module)
    if norm is not None and norm.weight is not None:
        mean, variance = (None if t is None else _values(t) for t in (norm.running_mean, norm.running_var))
        statistics = BatchNormStatistics(_values(norm.weight), _values(norm.bias), mean, variance)
        return scaling_batch_norm(filters, statistics, stay, go, threshold, lam)
    bias = maker.module.bias
    if isinstance(bias, Tensor):
        filters = torch.cat([filters, maker.by_unit(bias).cpu().double().reshape(len(filters), -1)], dim=1)
    return scaling_linear(filters, stay, go, threshold)


def _gone(group: ChannelGroup, kept: Sequence[int]) -> list[int]:
    return sorted(set(range(group.size)) - set(kept))


def _values(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _folds(model: nn.Module, graph: Graph, maker: Maker, scaling: Scaling, kept: Sequence[int]) -> list[Fold]:
    """Return the same matrix for every layer that reads these channels, and the constants of a norm on the way."""
    group, matrix, late = maker.group, scaling.matrix, _path(graph, maker.group).late
    if late is None:
        consumers = dict.fromkeys(graph.address(member.parameter) for member in group.consumers)
        return [Fold(consumer, group.name, matrix=matrix) for consumer in consumers]
    norm, gone = model.get_submodule(late), _gone(group, kept)
    assert isinstance(norm, _BatchNorm)
    matrix, constants = behind_late_norm(matrix, norm, torch.tensor(kept), torch.tensor(gone))
    folds = []
    for member in group.consumers:
        offset = torch.zeros(member.positions.size, dtype=torch.float64)
        offset[torch.from_numpy(places_of(member, group.size)[gone])] = constants[:, None]
        folds.append(Fold(graph.address(member.parameter), group.name, matrix=matrix, offset=offset))
    return folds
