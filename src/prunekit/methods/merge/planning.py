"""Decisions of `merge`: which layers can be compensated, which filters stay, and what the next layers take over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.methods.base import restoration
from prunekit.methods.merge.candidates import BEST, Layer, candidates
from prunekit.methods.merge.paths import behind_late_norm
from prunekit.methods.merge.widths import Kept, choose, rank, shortfall
from prunekit.plan import Fold, Keep, Operation, Plan
from prunekit.restoration.batch_norm_statistics import refit_norms
from prunekit.restoration.calibration import calibrate
from prunekit.restoration.images import Images, gather, reads_images
from prunekit.restoration.moments import modelled, moment_refits
from prunekit.restoration.paper import BatchNormStatistics, Scaling, scaling_batch_norm, scaling_linear
from prunekit.restoration.plain_layers import obstacle
from prunekit.restoration.second_moments import Reading, measure
from prunekit.restoration.synthetic import Synthesis, obstacle_to_synthesis, synthesise
from prunekit.surgery import Graph, trace
from prunekit.surgery.editing.compensation import places_of

if TYPE_CHECKING:
    from prunekit.methods.merge.config import MergeConfig

_OTHER_WAYS = {
    "moments": "it needs no data",
    "synthetic": "it needs no data",
    "calibrate": "it needs a few hundred images, without labels: name some with --data (from Python: images=...)",
}
_NOTHING = "no layer of this model can be merged: "
_CRITERION = {"paper": "l1-norm", "none": "l1-norm", "moments": "l2-norm"}  # elsewhere pivot, on measured readings


@dataclass(frozen=True)
class _Source:
    """Source of the statistics: a network and images for it. Both None where there are no images."""

    model: nn.Module
    images: Tensor | None
    made: Synthesis | None = None


def plan_merging(model: nn.Module, graph: Graph, config: MergeConfig, images: Images | None = None) -> Plan:
    """Return the plan of Neuron Merging and its relatives; see `Merge.plan`."""
    restore = restoration(config.restore, images, BEST)
    if config.refit_bn and images is None and restore != "synthetic":
        raise InputError("--refit-bn needs images", hint="name some with --data, or take --restore synthetic")
    layers, left = candidates(model, graph, restore, config.scope)
    if not layers:
        raise _refusal(model, graph, restore, config.scope, left)
    source = _source(model, graph, restore, images, config.seed)
    if restore == BEST:
        restore = next(way for way in ("moments", "paper", "none") if any(layer.way == way for layer in layers))
    kept, notes = _select(graph, layers, config, restore, source)
    plain = {layer.group.name: layer.reason for layer in layers if layer.reason and layer.group.name in kept}
    notes |= {"restore": restore, "merged": 0, "negative_scales": 0, "left": left, "plain": plain, "protected": []}
    plan = Plan([Keep(name, index) for name, index in kept.items()], notes)
    plan = _restored(model, graph, plan, layers, config, restore, source)
    if config.refit_bn and source.images is not None:
        plan = refit_norms(model, graph, plan, source.images)
    short = shortfall(graph, kept, config)
    return plan if short is None else _with_warning(plan, f"{short}: {_further(model, graph, layers, config)}")


def _further(model: nn.Module, graph: Graph, layers: Sequence[Layer], config: MergeConfig) -> str:
    """Return what to ask for where these layers are not enough."""
    usual = len(candidates(model, graph, BEST, config.scope)[0]) if config.restore else 0
    if usual > len(layers):
        return f"without --restore {config.restore} {usual} layers can be narrowed instead of {len(layers)}"
    every = len(candidates(model, graph, config.restore or BEST, "all")[0])
    if every > len(layers):
        return f"--scope all narrows {every} layers instead of {len(layers)}"
    return "--target-macs says how much is to be left"


def _with_warning(plan: Plan, warning: str) -> Plan:
    said = [plan.notes["warning"], warning] if plan.notes.get("warning") else [warning]
    return Plan(plan.operations, {**plan.notes, "warning": "; ".join(said)}, plan.example)


def _refusal(model: nn.Module, graph: Graph, restore: str, scope: str, left: Mapping[str, str]) -> InputError:
    """Return why nothing can be merged, and another way of restoration that can make up for some layers, if any."""
    graph = trace(model, graph.example)  # with sizes that are written into the code looked for
    reason = next(iter(left.values()), "it has no convolution or linear layer")
    possible = {
        "moments": True,
        "synthetic": obstacle_to_synthesis(model, graph) is None,
        "calibrate": reads_images(graph),
    }
    ways = [
        (f"--restore {way} can make up for what goes here; {said}", way, scope) for way, said in _OTHER_WAYS.items()
    ]
    ways.append(("--scope all --restore none prunes plainly, to be tuned afterwards", "none", "all"))
    for hint, way, wider in ways:
        other = possible.get(way, True) and (way, wider) != (restore, scope)
        layers = candidates(model, graph, way, wider)[0] if other else []
        if layers and (way == "none" or any(_is_refitted(model, graph, layer) for layer in layers)):
            return InputError(_NOTHING + left.get(layers[0].group.name, reason), hint=hint)
    return InputError(_NOTHING + reason, hint="prunekit inspect lists the groups")


def _is_refitted(model: nn.Module, graph: Graph, layer: Layer) -> bool:
    """Return whether any layer that reads these channels can be refitted."""
    return any(obstacle(model, graph, member) is None for member in layer.group.consumers)


def _source(model: nn.Module, graph: Graph, restore: str, images: Images | None, seed: int) -> _Source:
    if restore == "synthetic":
        made = synthesise(model, graph, seed=seed)
        return _Source(made.aligned, made.images, made)
    return _Source(model, None if images is None else gather(images, model, graph))


def _select(
    graph: Graph, layers: Sequence[Layer], config: MergeConfig, restore: str, source: _Source
) -> tuple[Kept, dict[str, Any]]:
    """Return the kept filters, and what they were chosen by."""
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
        if not readings and (source.images is None or config.criterion == "pivot" or config.widths == "loss"):
            raise InputError(
                "nothing is known of what the layers read, which --criterion pivot and --widths loss judge by",
                hint="without batch norm it takes images: name some with --data"
                if source.images is None
                else "what reads them is no plain layer: --criterion l2-norm --widths uniform judges by the weights",
            )
        if not readings:
            criterion, widths = config.criterion or "l2-norm", "uniform"
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
    """Return the plan with what makes up for its removals, by the way asked for."""
    if restore == "calibrate" and source.images is not None:
        return calibrate(model, graph, plan, source.images)
    if source.made is not None:
        return source.made.restored(model, graph, plan)
    able = {layer.group.name: layer for layer in layers if layer.reason is None}
    kept = {keep.group: keep.index for keep in plan.keeps}
    by_moments, by_folds = ([n for n in kept if n in able and able[n].way == way] for way in ("moments", "paper"))
    plan = _merged(graph, plan, able, {name: kept[name] for name in by_folds}, config)
    return Plan([*plan.operations, *moment_refits(model, graph, kept, by_moments)], plan.notes)


def _merged(
    graph: Graph, plan: Plan, layers: Mapping[str, Layer], kept: Mapping[str, Sequence[int]], config: MergeConfig
) -> Plan:
    """Return the paper's folds, and how many merges they make."""
    operations: list[Operation] = list(plan.operations)
    merged = negative = 0
    for name, units in kept.items():
        scaling = _compensate(layers[name], units, config)
        merged, negative = merged + scaling.merged, negative + scaling.negative
        operations += _folds(graph, layers[name], scaling, units)
    return Plan(operations, {**plan.notes, "merged": merged, "negative_scales": negative})


def _compensate(layer: Layer, kept: Sequence[int], config: MergeConfig) -> Scaling:
    stay = torch.tensor(kept)
    go = torch.tensor(sorted(set(range(layer.group.size)) - set(kept)))
    filters = layer.weight.cpu().double().flatten(1)
    norm = layer.norm
    if norm is not None and norm.weight is not None:
        mean, variance = (None if t is None else _values(t) for t in (norm.running_mean, norm.running_var))
        statistics = BatchNormStatistics(_values(norm.weight), _values(norm.bias), mean, variance)
        return scaling_batch_norm(filters, statistics, stay, go, config.threshold, config.lam)
    bias = layer.module.bias
    if isinstance(bias, Tensor):
        filters = torch.cat([filters, layer.by_unit(bias).cpu().double().reshape(len(filters), -1)], dim=1)
    return scaling_linear(filters, stay, go, config.threshold)


def _values(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _folds(graph: Graph, layer: Layer, scaling: Scaling, kept: Sequence[int]) -> list[Fold]:
    """Return the same matrix for every layer that reads these channels, and the constants of a norm on the way."""
    group, matrix = layer.group, scaling.matrix
    if layer.late is None:
        consumers = dict.fromkeys(graph.address(member.parameter) for member in group.consumers)
        return [Fold(consumer, group.name, matrix=matrix) for consumer in consumers]
    gone = sorted(set(range(group.size)) - set(kept))
    matrix, constants = behind_late_norm(matrix, layer.late, torch.tensor(kept), torch.tensor(gone))
    folds = []
    for member in group.consumers:
        offset = torch.zeros(member.positions.size, dtype=torch.float64)
        offset[torch.from_numpy(places_of(member, group.size)[gone])] = constants[:, None]
        folds.append(Fold(graph.address(member.parameter), group.name, matrix=matrix, offset=offset))
    return folds
