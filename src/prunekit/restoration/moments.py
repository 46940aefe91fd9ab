"""What layers read, modelled in closed form from filters and norms, without images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.progress import counter
from prunekit.restoration.gaussian import (
    Filters,
    activated,
    behind_norm,
    correlations,
    depthwise_correlations,
    scale_and_shift,
)
from prunekit.restoration.modelled_path import Stage, stages
from prunekit.restoration.moment_propagation import spreads
from prunekit.restoration.plain_layers import bias_of
from prunekit.restoration.refit_targets import norm_behind
from prunekit.restoration.second_moments import Reading, gram_of
from prunekit.restoration.streams import find_join, scale_of
from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.editing.compensation import places_of
from prunekit.surgery.ops import is_batch_norm

WIDEST = 1024  # units of a layer behind a norm that are ordered by what they explain; 3072 would take minutes


def obstacle_to_moments(model: nn.Module, graph: Graph, group: ChannelGroup) -> str | None:
    """Return why what the consumers of a group read cannot be modelled, or None."""
    return stages(model, graph, group)[1]


def knows_moments(model: nn.Module, graph: Graph, group: ChannelGroup) -> bool:
    """Return whether a norm tells the statistics of a group's layer, whatever stands behind it."""
    return bool(stages(model, graph, group)[0])


def modelled(model: nn.Module, graph: Graph, groups: Sequence[ChannelGroup]) -> dict[str, Reading]:
    """Return the readings of the groups whose statistics can be modelled, by name.

    Without the widest layers of transformers, which are then judged by their weights.
    """
    found, varying, count = {}, spreads(model, graph), counter("modelling activations")
    for done, group in enumerate(groups):
        count(done, len(groups))
        if len(group.producers) == 1 and obstacle_to_moments(model, graph, group) is None:
            in_front = stages(model, graph, group)[0][0].in_front
            if in_front and group.size > WIDEST:
                continue
            _, covariance = moments_behind(model, graph, group, 0)
            gram: Tensor = torch.zeros_like(covariance[0])
            for member in group.consumers:
                norm = norm_behind(model, graph, member.module)
                scale = scale_of(model, norm).cpu()
                scale = torch.where(scale.isfinite(), scale, 0.0)
                weight = consumer_weight(model, member)
                places = torch.from_numpy(places_of(member, group.size)).to(weight.device)
                part = gram_of(weight.movedim(member.dim, -1), places, scale)
                whole = float((part * covariance[0]).sum())
                if norm is not None and member.positions.size < weight.size(member.dim):
                    whole = max(whole, float(scale.square() @ _variance_of(model, norm)))
                join = find_join(model, graph, member.module)
                stream = varying.get(graph.nodes[join.sum].outputs[0]) if join else None
                gram += part / max(whole if stream is None else float(stream[1].sum()), 1e-30)
            found[group.name] = Reading(covariance[0], gram, modelled=True, in_front=in_front)
    return found


def _variance_of(model: nn.Module, norm: str) -> Tensor:
    variance = model.get_submodule(norm).running_var
    assert isinstance(variance, Tensor)
    return variance.cpu()


def moments_behind(model: nn.Module, graph: Graph, group: ChannelGroup, reach: int) -> tuple[Tensor, Tensor]:
    """Return mean and covariances of a group in front of its consumers, shifted by up to `reach` along both axes.

    Behind a depthwise convolution there are none but those at one place.
    """
    (first, *further), _ = stages(model, graph, group)
    filters, (scale, shift) = _filters(model, first), _known(model, first)
    if first.in_front:
        assert first.layer.read is not None
        bias = bias_of(first.layer.read.parameter.rpartition(".")[0])
        own = model.get_parameter(bias) if bias in graph.parameters else None
        centred = first.norm.op == "native_layer_norm"
        filters, scale, shift = behind_norm(filters, scale, shift, own, centred=centred)
    rho = correlations(filters, shifts(len(filters.stride), reach))
    found = activated(scale, shift, first.activation.function, rho, filters.stride)
    for stage in further:
        rho = depthwise_correlations(found, _filters(model, stage))
        found = activated(*_known(model, stage), stage.activation.function, rho)
    covariances = found.covariances()
    if not bool(torch.isfinite(covariances).all()):
        name = first.norm.module
        raise InputError(f"what is behind '{name}' cannot be modelled: its statistics are too large")
    return found.mean, covariances


def _filters(model: nn.Module, stage: Stage) -> Filters:
    read = stage.layer.read
    assert read is not None
    return Filters(model.get_parameter(read.parameter), read.stride, read.dilation)


def _known(model: nn.Module, stage: Stage) -> tuple[Tensor, Tensor]:
    """Return the deviations and means that the norm of a stage gives its channels.

    Raises:
        InputError: they, or the weights of the layer, are no numbers, or a variance is negative.
    """
    weight = _filters(model, stage).weight
    if is_batch_norm(stage.norm.op):
        name = stage.norm.parameters[0].rpartition(".")[0]
        norm: Any = model.get_submodule(name)
        if bool((norm.running_var < 0).any()):
            raise InputError(f"'{name}' holds a running variance below zero")
        scale, shift = scale_and_shift(norm)
        told: tuple[Any, ...] = (norm.running_mean, norm.running_var, scale, shift)
    else:
        given = [model.get_parameter(name).detach().double().cpu() for name in stage.norm.parameters]
        scale = given[0] if given else torch.ones(weight.size(1), dtype=torch.float64)
        shift = given[1] if len(given) > 1 else torch.zeros_like(scale)
        name, told = stage.norm.module, (scale, shift)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (weight, *told)):
        raise InputError(f"'{name}' or the layer beside it holds values that are not finite")
    return scale, shift


def consumer_weight(model: nn.Module, member: Member) -> Tensor:
    """Return the weights of a consumer, in double precision.

    Raises:
        InputError: they are no numbers.
    """
    weight = model.get_parameter(member.parameter).detach().double().cpu()
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"'{member.parameter}' holds values that are not finite")
    return weight


def shifts(axes: int, reach: int) -> list[tuple[int, ...]]:
    """Return all shifts, none first."""
    if axes < 1:
        return [()]
    grid = torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * axes).reshape(-1, axes)
    every = [tuple(int(v) for v in row) for row in grid]
    return sorted(every, key=lambda shift: sum(map(abs, shift)))
