"""Restoration in closed form, without images: least squares on modelled moments, and the next batch norm corrected.

With `P` the modelled covariance of what a consumer reads, all kernel taps at once, its weights on the kept channels
become `W_k + (W P - W_k P_k) (P_kk + ridge)^-1` (columns for the kept ones). What the kept channels cannot explain
shows in two numbers that batch norm holds: its running mean moves by the change of the output's mean (each tap weighed
by the share of positions where it is not on padding), its running variance by the ratio of modelled variances.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.plan import Refit
from prunekit.progress import counter
from prunekit.restoration.gaussian import Filters, activated, correlations, depthwise_correlations
from prunekit.restoration.modelled_path import Stage, stages
from prunekit.restoration.moment_propagation import spreads
from prunekit.restoration.plain_layers import reads
from prunekit.restoration.refit_targets import norm_behind
from prunekit.restoration.second_moments import Reading, gram_of
from prunekit.restoration.streams import find_join, scale_of
from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.editing.compensation import places_of
from prunekit.surgery.graph.recording import Node

RIDGE = 0.03  # of the mean variance; 0.1 and 0.3 did worse on held-out training images
_LARGEST = 5000  # inputs of a consumer that are solved for at once; beyond, all taps share one matrix


def obstacle_to_moments(model: nn.Module, graph: Graph, group: ChannelGroup) -> str | None:
    """Return why what the consumers of a group read cannot be modelled, or None."""
    return stages(model, graph, group)[1]


def modelled(model: nn.Module, graph: Graph, groups: Sequence[ChannelGroup]) -> dict[str, Reading]:
    """Return the readings of the groups whose statistics can be modelled, by name."""
    found, varying, count = {}, spreads(model, graph), counter("modelling activations")
    for done, group in enumerate(groups):
        count(done, len(groups))
        if len(group.producers) == 1 and obstacle_to_moments(model, graph, group) is None:
            _, covariance = _behind(model, graph, group, 0)
            gram: Tensor = torch.zeros_like(covariance[0])
            for member in group.consumers:
                scale = scale_of(model, norm_behind(model, graph, member.module)).cpu()
                weight = _weight(model, member)
                part = gram_of(weight, member, group.size, torch.where(scale.isfinite(), scale, 0.0))
                own = float((part * covariance[0]).sum())
                join = find_join(model, graph, member.module)
                stream = varying.get(graph.nodes[join.sum].outputs[0]) if join else None
                gram += part / max(own if stream is None else float(stream[1].sum()), 1e-30)
            found[group.name] = Reading(covariance[0], gram, modelled=True)
    return found


def moment_refits(
    model: nn.Module, graph: Graph, kept: Mapping[str, Sequence[int]], groups: Iterable[str]
) -> list[Refit]:
    """Return new weights and statistics for every consumer of `groups`, in the shapes that are left by `kept`.

    Raises:
        InputError: weights or statistics that are no numbers.
    """
    stays = graph.kept_indices(graph.kept_classes(kept))
    refits, names, count = list[Refit](), list(groups), counter("refitting layers")
    for done, name in enumerate(names):
        count(done, len(names))
        group = graph.group(name)
        for member in group.consumers:
            refits += _refit(model, graph, group, member, list(kept[name]), stays)
    return refits


def _behind(model: nn.Module, graph: Graph, group: ChannelGroup, reach: int) -> tuple[Tensor, Tensor]:
    """Return mean and covariances of a group in front of its consumers, shifted by up to `reach` along both axes.

    Behind a depthwise convolution there are none but those at one place.
    """
    (first, *further), _ = stages(model, graph, group)
    filters = _filters(model, first)
    rho = correlations(filters, _shifts(len(filters.stride), reach))
    found = activated(_norm(model, first), first.activation.function, rho, filters.stride)
    for stage in further:
        rho = depthwise_correlations(found, _filters(model, stage))
        found = activated(_norm(model, stage), stage.activation.function, rho)
    covariances = found.covariances()
    if not bool(torch.isfinite(covariances).all()):
        raise InputError(f"what is behind '{first.norm}' cannot be modelled: its statistics are too large")
    return found.mean, covariances


def _filters(model: nn.Module, stage: Stage) -> Filters:
    read = stage.layer.read
    assert read is not None
    return Filters(model.get_parameter(read.parameter), read.stride, read.dilation)


def _norm(model: nn.Module, stage: Stage) -> Any:
    """Return the batch norm of a stage.

    Raises:
        InputError: it, or the weights in front of it, are no numbers, or a variance is negative.
    """
    norm: Any = model.get_submodule(stage.norm)
    if bool((norm.running_var < 0).any()):
        raise InputError(f"'{stage.norm}' holds a running variance below zero")
    for tensor in (_filters(model, stage).weight, norm.running_var, norm.running_mean, norm.weight, norm.bias):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"'{stage.norm}' or the layer before it holds values that are not finite")
    return norm


def _weight(model: nn.Module, member: Member) -> Tensor:
    """Return the weights of a consumer, in double precision.

    Raises:
        InputError: they are no numbers.
    """
    weight = model.get_parameter(member.parameter).detach().double().cpu()
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"'{member.parameter}' holds values that are not finite")
    return weight


def _shifts(axes: int, reach: int) -> list[tuple[int, ...]]:
    """Return all shifts, none first."""
    if axes < 1:
        return [()]
    grid = torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * axes).reshape(-1, axes)
    every = [tuple(int(v) for v in row) for row in grid]
    return sorted(every, key=lambda shift: sum(map(abs, shift)))


def _refit(
    model: nn.Module, graph: Graph, group: ChannelGroup, member: Member, kept: list[int], stays: Mapping[Any, Any]
) -> list[Refit]:
    consumer = reads(graph, member.module)[0]
    weight = _weight(model, member)
    places = torch.from_numpy(places_of(member, group.size))
    if _sees_neighbours(model, graph, group, consumer):
        assert consumer.read is not None
        size, step = weight.size(-1), consumer.read.dilation[0]
        mean, covariance = _behind(model, graph, group, (size - 1) * step)
        columns = weight[:, places[:, 0]].flatten(1)  # (outputs, units * taps)
        patch = _patches(covariance, size, step)
        taps = weight[0, 0].numel()
    else:
        mean, covariance = _behind(model, graph, group, 0)
        # each tap and place on its own: they are rows of their own to the same covariance
        columns = weight.movedim(1, -1)[..., places].movedim(-1, 1).reshape(-1, group.size)
        patch, taps = covariance[0], 1
    index = torch.tensor([unit * taps + tap for unit in kept for tap in range(taps)])
    solved = _solve(columns, patch, index)
    before = ((columns @ patch) * columns).sum(1).reshape(weight.size(0), -1).sum(1)
    after = ((solved @ patch[index][:, index]) * solved).sum(1).reshape(weight.size(0), -1).sum(1)
    new = _write(weight, solved, places, kept, whole=taps > 1)
    read = places[kept].flatten().sort().values
    shares = _shares(graph, consumer)
    units_of = torch.empty(weight.size(1), dtype=torch.int64)
    units_of[places.flatten()] = torch.arange(group.size).repeat_interleave(places.size(1))
    shift = _output_mean(new[:, read], mean[units_of[read]], shares) - _output_mean(weight, mean[units_of], shares)
    return _as_refits(model, graph, member.module, new[:, read], shift, after / before.clamp_min(1e-30), stays)


def _sees_neighbours(model: nn.Module, graph: Graph, group: ChannelGroup, consumer: Node) -> bool:
    """Return whether the consumer is a 2-d convolution right behind the activation, and small enough."""
    assert consumer.read is not None
    found, _ = stages(model, graph, group)
    taps = graph.shapes[consumer.read.parameter][2:]
    if len(found) > 1 or len(taps) != 2 or len(graph.shapes[group.producers[0].parameter]) != 4 or taps == (1, 1):
        return False
    square = len({*taps}) == 1 and len({*consumer.read.dilation}) == 1
    direct = _unpadded(graph, consumer.inputs[0])[0] == found[0].value
    return square and direct and math.prod(graph.shapes[consumer.read.parameter][1:]) <= _LARGEST


def _patches(covariance: Tensor, size: int, step: int) -> Tensor:
    """Return the covariance of all a kernel sees, from that of shifted channels: `(units * taps, units * taps)`."""
    units = covariance.size(1)
    number = {shift: i for i, shift in enumerate(_shifts(2, (size - 1) * step))}
    taps = [(y, x) for y in range(size) for x in range(size)]
    order = torch.tensor([[number[(step * (v - y), step * (u - x))] for v, u in taps] for y, x in taps])
    return covariance[order].permute(2, 0, 3, 1).reshape(units * len(taps), units * len(taps))


def _solve(columns: Tensor, patch: Tensor, index: Tensor) -> Tensor:
    """Solve the ridge regression towards the present weights on the kept inputs.

    A modelled covariance is positive definite up to rounding alone: where the ridge does not cover that, a larger one
    leaves more of the weights as they are.
    """
    kept = patch[index][:, index]
    present = columns[:, index]
    spread = float(patch.diagonal().mean())
    penalty = RIDGE * spread if spread > 0 else 1.0
    rest = (columns @ patch)[:, index] - present @ kept
    kept.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(kept)
    while bool(failed):  # ends: what is finite is positive definite with enough on its diagonal
        kept.diagonal().add_(9 * penalty)
        penalty *= 10
        factor, failed = torch.linalg.cholesky_ex(kept)
    return present + torch.cholesky_solve(rest.t(), factor).t()


def _write(weight: Tensor, solved: Tensor, places: Tensor, kept: list[int], *, whole: bool) -> Tensor:
    """Return the full-width weights with the kept units' replaced."""
    new = weight.clone()
    if whole:
        new[:, places[kept, 0]] = solved.reshape(weight.size(0), len(kept), *weight.shape[2:])
        return new
    columns = new.movedim(1, -1)
    shape = (weight.size(0), places.size(1), *weight.shape[2:], len(kept))
    columns[..., places[kept]] = solved.reshape(shape).movedim(1, -1)
    return new


def _output_mean(weight: Tensor, mean: Tensor, shares: Tensor) -> Tensor:
    """Return the mean of each output, `(outputs,)`, for inputs of these means."""
    return torch.einsum("oct,c,t->o", weight.reshape(*weight.shape[:2], -1), mean, shares)


def _shares(graph: Graph, consumer: Node) -> Tensor:
    """Return, for each kernel tap, the share of output positions where it is not on zeros, padded here or before."""
    assert consumer.read is not None
    value, before = _unpadded(graph, consumer.inputs[0])
    made = graph.maker(value)
    shares = torch.ones(1, dtype=torch.float64)
    for axis, size in enumerate(graph.shapes[consumer.read.parameter][2:]):
        read = made.shape[2 + axis] if made and len(made.shape) == len(consumer.shape) else math.inf
        first = consumer.read.padding[axis] + (before[axis] if before else 0)
        starts = torch.arange(consumer.shape[2 + axis]) * consumer.read.stride[axis] - first
        at = starts[None] + torch.arange(size)[:, None] * consumer.read.dilation[axis]
        shares = torch.kron(shares, ((at >= 0) & (at < read)).double().mean(1))
    return shares


def _unpadded(graph: Graph, value: int) -> tuple[int, tuple[int, ...]]:
    """Return the value before zeros were put around it, and how many in front, along each axis of an image."""
    made = graph.maker(value)
    pad = made.settings["pad"] if made and made.op == "constant_pad_nd" and not made.settings.get("value") else ()
    if made is None or len(pad) != 2 * (len(made.shape) - 2):
        return value, ()
    return made.inputs[0], tuple(pad[::2][::-1])


def _as_refits(
    model: nn.Module, graph: Graph, name: str, weight: Tensor, shift: Tensor, ratio: Tensor, stays: Mapping[Any, Any]
) -> list[Refit]:
    """Return the values in the shapes that are left: the shift goes into the norm's running mean, or into the bias."""
    consumer: Any = model.get_submodule(name)
    norm_name = norm_behind(model, graph, name)
    rows = stays.get((f"{name}.weight", 0))
    index = torch.arange(len(weight)) if rows is None else torch.from_numpy(rows)
    values = {"weight": weight[index].to(consumer.weight)}
    if norm_name is not None:
        norm: Any = model.get_submodule(norm_name)
        mean = norm.running_mean[index.to(norm.running_mean.device)]
        variance = norm.running_var[index.to(norm.running_mean.device)]
        statistics = {
            "running_mean": mean + shift[index].to(mean),
            "running_var": variance * ratio[index].clamp(0.01, 100).to(variance),
        }
        return [Refit(name, values), Refit(norm_name, statistics)]
    if consumer.bias is not None:
        values["bias"] = consumer.bias.detach()[index.to(consumer.bias.device)] - shift[index].to(consumer.bias)
    return [Refit(name, values)]
