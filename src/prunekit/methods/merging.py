"""How `merge` decides: which layers can be compensated, which filters stay, and what the next layers take over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.methods.base import restoration
from prunekit.methods.budget import Budget, check_ratio, fewest, read_budget
from prunekit.methods.ranking import round_widths
from prunekit.plan import Fold, Keep, Operation, Plan
from prunekit.restore.calibrate import calibrate
from prunekit.restore.images import Images
from prunekit.restore.paper import BatchNormStatistics, Scaling, scaling_batch_norm, scaling_linear
from prunekit.surgery import ChannelGroup, Graph, predict
from prunekit.surgery.layer_rules import is_batch_norm
from prunekit.surgery.recording import Node

if TYPE_CHECKING:
    from prunekit.methods.merge import MergeConfig

# Ops f with f(s x) = s f(x) for every s >= 0: a merged channel passes through them.
_HOMOGENEOUS = frozenset(
    (
        *("relu", "leaky_relu", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
        *("max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "avg_pool1d", "mean", "sum", "amax"),
        *("view", "_unsafe_view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "clone", "detach"),
        *("native_dropout", "alias", "_to_copy", "upsample_nearest2d"),
    )
)


@dataclass(frozen=True)
class Layer:
    """A layer whose filters can be merged: its group, its module, and the batch norm right behind it."""

    group: ChannelGroup
    module: nn.Module
    norm: nn.Module | None

    @property
    def weight(self) -> Tensor:
        """Filters, outputs first: `(C, ...)`."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()


def plan_merging(model: nn.Module, graph: Graph, config: MergeConfig, images: Images | None = None) -> Plan:
    """The plan of Neuron Merging; see `Merge.plan`."""
    restore = restoration(config.restore, images, "paper")
    layers, left = mergeable_layers(model, graph)
    if not layers:
        reason = next(iter(left.values()), "it has no convolution or linear layer")
        raise InputError(f"no layer of this model can be merged: {reason}", hint="prunekit inspect lists the groups")
    kept = _choose(graph, layers, config)
    operations: list[Operation] = [Keep(name, index) for name, index in kept.items()]
    merged = negative = 0
    if restore == "paper":
        for layer in layers:
            if layer.group.name in kept:
                scaling = _compensate(layer, kept[layer.group.name], config)
                merged, negative = merged + scaling.merged, negative + scaling.negative
                operations += _folds(layer, scaling)
    notes = {"restore": restore, "merged": merged, "negative_scales": negative, "left": left, "protected": []}
    plan = Plan(operations, notes)
    return calibrate(model, graph, plan, images) if restore == "calibrate" and images is not None else plan


def mergeable_layers(model: nn.Module, graph: Graph) -> tuple[list[Layer], dict[str, str]]:
    """The layers whose every consumer can take over, and for the other groups why not."""
    modules = dict(model.named_modules())
    layers, left = [], {}
    cut = graph.balanced_groups()
    for group in graph.groups:
        reason = "the network cuts these channels into equal parts" if group.name in cut else None
        reason = reason or _obstacle(graph, group, modules)
        if reason is None:
            producer = group.producers[0].module
            norm = graph.batch_norm_after(producer)
            layers.append(Layer(group, modules[producer], modules[norm] if norm else None))
        else:
            left[group.name] = reason
    return layers, left


def _obstacle(graph: Graph, group: ChannelGroup, modules: Mapping[str, nn.Module]) -> str | None:
    if group.frozen:
        return next(iter(group.frozen.values()))
    if len(group.producers) != 1:
        return "several layers add into these channels"
    producer = modules.get(group.producers[0].module)
    if not isinstance(producer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        return f"its channels come from a {type(producer).__name__}"
    if getattr(producer, "groups", 1) != 1:
        return "a grouped convolution makes these channels"
    consumers = {member.parameter for member in group.consumers}
    if not consumers:
        return "no layer reads these channels"
    if any(getattr(modules[member.module], "groups", 1) != 1 for member in group.consumers):
        return "a grouped convolution reads these channels"
    for call in graph.calls(group.producers[0].module):
        if call.op in ("convolution", "addmm", "mm"):
            reason = _blocked(graph, call, consumers)
            if reason:
                return reason
    return None


def _blocked(graph: Graph, producer: Node, consumers: set[str]) -> str | None:
    """The first op between a layer and its consumers that a scale does not pass, or None."""
    waiting = [(reader, True) for reader in graph.readers(producer.outputs[0])]
    seen = set()
    while waiting:
        node, first = waiting.pop()
        if node.index in seen or consumers.intersection(node.parameters):
            continue
        seen.add(node.index)
        if not (node.op in _HOMOGENEOUS or (first and is_batch_norm(node.op))):
            return f"'{node.op}' in {node.module} stands between this layer and the next"
        if node.outputs:
            waiting += [(reader, False) for reader in graph.readers(node.outputs[0])]
    return None


def _choose(graph: Graph, layers: Sequence[Layer], config: MergeConfig) -> dict[str, list[int]]:
    """The kept filters of every layer, for the ratio asked for or for the one that meets the target."""
    scores = {layer.group.name: importance(layer.weight, config.criterion) for layer in layers}
    groups = [layer.group for layer in layers]
    if isinstance(config.ratio, dict):
        kept = _keep_by_group(graph, layers, scores, config)
        return round_widths(groups, scores, kept, config.round_to)
    budget = read_budget(config, predict(graph, graph.kept_classes({})))

    def keeps_at(ratio: float) -> dict[str, list[int]]:
        kept = {layer.group.name: _largest(layer, scores, ratio, config.min_channels) for layer in layers}
        return round_widths(groups, scores, {n: k for n, k in kept.items() if k is not None}, config.round_to)

    return keeps_at(budget.amount if budget.kind == "ratio" else _ratio_for(graph, budget, keeps_at))


def _keep_by_group(
    graph: Graph, layers: Sequence[Layer], scores: Mapping[str, np.ndarray], config: MergeConfig
) -> dict[str, list[int]]:
    assert isinstance(config.ratio, dict)
    by_name = {layer.group.name: layer for layer in layers}
    kept = {}
    for name, ratio in config.ratio.items():
        group = graph.group(name)
        if group.name not in by_name:
            raise InputError(f"channel group '{name}' cannot be merged: see 'left' in prunekit inspect")
        index = _largest(by_name[group.name], scores, check_ratio(ratio), config.min_channels)
        if index is not None:
            kept[group.name] = index
    return kept


def _largest(layer: Layer, scores: Mapping[str, np.ndarray], ratio: float, least: int) -> list[int] | None:
    """The filters that stay, ascending. The paper truncates the number for convolutions, rounds it for linear ones."""
    size = layer.group.size
    wanted = size * (1 - ratio)
    number = max(least, 1, round(wanted) if isinstance(layer.module, nn.Linear) else int(wanted))
    if number >= size:
        return None
    ranked = np.argsort(-scores[layer.group.name], kind="stable")
    return sorted(int(unit) for unit in ranked[:number])


def _ratio_for(graph: Graph, budget: Budget, keeps_at: object) -> float:
    """The smallest uniform ratio, to a thousandth, whose network meets the target.

    Raises:
        InputError: even the largest ratio leaves more.
    """
    assert callable(keeps_at)

    def cost(step: int) -> object:
        return predict(graph, graph.kept_classes(keeps_at(step / 1000)))

    step = 1 + fewest(998, lambda k: budget.met_by(cost(k + 1)))  # type: ignore[arg-type]
    if not budget.met_by(cost(step)):  # type: ignore[arg-type]
        raise InputError(f"the target of {budget.amount:,.0f} {budget.kind} cannot be met by merging these layers")
    return step / 1000


def importance(weight: Tensor, criterion: str) -> np.ndarray:
    """A score for each filter, `(C,)`: `l1-norm`, `l2-norm`, or `l2-GM`, the sum of distances to all filters."""
    flat = weight.flatten(1).double().cpu()
    if criterion == "l2-GM":
        scores = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
    else:
        scores = flat.norm(p=1 if criterion == "l1-norm" else 2, dim=1)
    return scores.numpy()


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
        filters = torch.cat([filters, bias.detach().cpu().double().unsqueeze(1)], dim=1)
    return scaling_linear(filters, stay, go, config.threshold)


def _values(norm: nn.Module, name: str) -> Tensor:
    values = getattr(norm, name)
    assert isinstance(values, Tensor)
    return values.detach().cpu().double()


def _folds(layer: Layer, scaling: Scaling) -> list[Fold]:
    """The same matrix for every layer that reads these channels."""
    consumers = dict.fromkeys(member.module for member in layer.group.consumers)
    return [Fold(consumer, layer.group.name, matrix=scaling.matrix) for consumer in consumers]
