"""How `merge` decides: which layers can be compensated, which filters stay, and what the next layers take over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.methods.base import restoration
from prunekit.methods.candidates import Layer, candidates
from prunekit.methods.widths import Kept, choose, rank
from prunekit.plan import Fold, Keep, Operation, Plan
from prunekit.restore.calibrate import calibrate
from prunekit.restore.images import MEMORY, Images, gather
from prunekit.restore.moments import modelled, moment_refits
from prunekit.restore.norms import refit_norms
from prunekit.restore.paper import BatchNormStatistics, Scaling, scaling_batch_norm, scaling_linear
from prunekit.restore.readings import Reading, measure
from prunekit.restore.synthetic import Synthesis, synthesise
from prunekit.surgery import Graph

if TYPE_CHECKING:
    from prunekit.methods.merge import MergeConfig

_CRITERION = {"paper": "l1-norm", "none": "l1-norm", "moments": "l2-norm"}  # elsewhere pivot, on measured readings


@dataclass(frozen=True)
class _Source:
    """What the statistics come from: a network and images for it. Both None where there are no images."""

    model: nn.Module
    images: Tensor | None
    made: Synthesis | None = None


def plan_merging(model: nn.Module, graph: Graph, config: MergeConfig, images: Images | None = None) -> Plan:
    """The plan of Neuron Merging and its relatives; see `Merge.plan`."""
    restore = restoration(config.restore, images, "paper")
    if config.refit_bn and images is None and restore != "synthetic":
        raise InputError("--refit-bn needs images", hint="name some with --data, or take --restore synthetic")
    layers, left = candidates(model, graph, restore, config.scope)
    if not layers:
        reason = next(iter(left.values()), "it has no convolution or linear layer")
        raise InputError(f"no layer of this model can be merged: {reason}", hint="prunekit inspect lists the groups")
    source = _source(model, graph, restore, images, config.seed)
    kept, notes = _select(graph, layers, config, restore, source)
    plain = {layer.group.name: layer.reason for layer in layers if layer.reason and layer.group.name in kept}
    notes |= {"restore": restore, "merged": 0, "negative_scales": 0, "left": left, "plain": plain, "protected": []}
    plan = Plan([Keep(name, index) for name, index in kept.items()], notes)
    plan = _restored(model, graph, plan, layers, config, restore, source)
    if config.refit_bn and source.images is not None:
        plan = refit_norms(model, graph, plan, source.images)
    return plan


def _source(model: nn.Module, graph: Graph, restore: str, images: Images | None, seed: int) -> _Source:
    if restore == "synthetic":
        made = synthesise(model, graph, seed=seed)
        return _Source(made.aligned, made.images, made)
    return _Source(model, None if images is None else gather(images, model, graph, MEMORY))


def _select(
    graph: Graph, layers: Sequence[Layer], config: MergeConfig, restore: str, source: _Source
) -> tuple[Kept, dict[str, Any]]:
    """The kept filters, and what they were chosen by."""
    criterion = config.criterion or _CRITERION.get(restore, "pivot")
    uniform = restore in ("paper", "none") or isinstance(config.ratio, dict)
    widths = config.widths or ("uniform" if uniform else "loss")
    readings: dict[str, Reading] = {}
    if criterion == "pivot" or widths == "loss":
        groups = [layer.group for layer in layers]
        if source.images is None:
            readings = modelled(source.model, graph, groups)
        else:
            readings = measure(source.model, graph, groups, source.images)
        if not readings:
            raise InputError(
                "nothing is known of what the layers read, which --criterion pivot and --widths loss judge by",
                hint="without batch norm it takes images: name some with --data",
            )
    ranked = rank(layers, criterion, readings)
    kept = choose(graph, ranked, config, readings if widths == "loss" else {})
    return kept, {"criterion": criterion, "widths": widths}


def _restored(
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    layers: Sequence[Layer],
    config: MergeConfig,
    restore: str,
    source: _Source,
) -> Plan:
    """The plan with what makes up for its removals, by the way asked for."""
    if restore == "calibrate" and source.images is not None:
        return calibrate(model, graph, plan, source.images)
    if source.made is not None:
        return source.made.restored(model, graph, plan)
    able = {layer.group.name: layer for layer in layers if layer.reason is None}
    kept = {keep.group: keep.index for keep in plan.keeps if keep.group in able}
    if restore == "moments":
        return Plan([*plan.operations, *moment_refits(model, graph, kept)], plan.notes)
    return _merged(plan, able, kept, config) if restore == "paper" else plan


def _merged(plan: Plan, layers: Mapping[str, Layer], kept: Mapping[str, Sequence[int]], config: MergeConfig) -> Plan:
    """The paper's folds, and how many merges they make."""
    operations: list[Operation] = list(plan.operations)
    merged = negative = 0
    for name, units in kept.items():
        scaling = _compensate(layers[name], units, config)
        merged, negative = merged + scaling.merged, negative + scaling.negative
        operations += _folds(layers[name], scaling)
    return Plan(operations, {**plan.notes, "merged": merged, "negative_scales": negative})


def _compensate(layer: Layer, kept: Sequence[int], config: MergeConfig) -> Scaling:
    stay = torch.tensor(kept)
    go = torch.tensor(sorted(set(range(layer.group.size)) - set(kept)))
    filters = layer.weight.cpu().double().flatten(1)
    norm = layer.norm
    if norm is not None and norm.weight is not None:
        statistics = BatchNormStatistics(
            *(_values(norm, name) for name in ("weight", "bias", "running_mean", "running_var"))
        )
        return scaling_batch_norm(filters, statistics, stay, go, config.threshold, config.lam)
    bias = layer.module.bias
    if isinstance(bias, Tensor):
        filters = torch.cat([filters, layer.by_unit(bias).cpu().double().reshape(len(filters), -1)], dim=1)
    return scaling_linear(filters, stay, go, config.threshold)


def _values(norm: nn.Module, name: str) -> Tensor:
    values = getattr(norm, name)
    assert isinstance(values, Tensor)
    return values.detach().cpu().double()


def _folds(layer: Layer, scaling: Scaling) -> list[Fold]:
    """The same matrix for every layer that reads these channels."""
    consumers = dict.fromkeys(member.module for member in layer.group.consumers)
    return [Fold(consumer, layer.group.name, matrix=scaling.matrix) for consumer in consumers]
