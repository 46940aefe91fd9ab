"""Restoration in closed form, without images: least squares on modelled moments, and the next batch norm corrected.

With `P` the modelled covariance of what a consumer reads, all kernel taps at once, its weights on the kept channels
become `W_k + (W P - W_k P_k) (P_kk + ridge)^-1` (columns for the kept ones). Where it reads several groups, each is
solved for on its own. What the kept channels cannot explain shows in two numbers that batch norm holds: its running
mean moves by the change of the output's mean (each tap weighed by the share of positions where it is not on padding),
its running variance by what the modelled variance loses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.plan import Refit
from prunekit.progress import counter
from prunekit.restoration.modelled_path import stages
from prunekit.restoration.moments import consumer_weight, moments_behind, shifts
from prunekit.restoration.plain_layers import reads, weight_of
from prunekit.restoration.refit_targets import norm_behind
from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.editing.compensation import places_of
from prunekit.surgery.graph.recording import Node

RIDGE = 0.03  # of the mean variance; 0.1 and 0.3 did worse on held-out training images
_LARGEST = 5000  # inputs of a consumer that are solved for at once; beyond, all taps share one matrix


@dataclass(frozen=True)
class _Part:
    """What becomes of one group's share in a consumer, `size` inputs: the kept ones and their weights.

    Also the shift of each output's mean, and the variance of each output before and after, all three `(outputs,)`.
    """

    size: int
    inputs: Tensor
    weight: Tensor
    shift: Tensor
    before: Tensor
    after: Tensor


def moment_refits(
    model: nn.Module, graph: Graph, kept: Mapping[str, Sequence[int]], groups: Iterable[str]
) -> list[Refit]:
    """Return new weights and statistics for every consumer of `groups`, in the shapes that are left by `kept`.

    Raises:
        InputError: weights or statistics that are no numbers.
    """
    stays = graph.kept_indices(graph.kept_classes(kept))
    read: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    for group in map(graph.group, groups):
        for member in group.consumers:
            read.setdefault(member.module, []).append((group, member))
    refits, count = list[Refit](), counter("refitting layers")
    for done, (name, own) in enumerate(read.items()):
        count(done, len(read))
        parts = [_part(model, graph, group, member, list(kept[group.name])) for group, member in own]
        refits += _as_refits(model, graph, name, parts, stays)
    return refits


def _part(model: nn.Module, graph: Graph, group: ChannelGroup, member: Member, kept: list[int]) -> _Part:
    consumer = reads(graph, member.module)[0]
    weight = consumer_weight(model, member)
    places = torch.from_numpy(places_of(member, group.size))
    if _sees_neighbours(model, graph, group, consumer):
        assert consumer.read is not None
        size, step = weight.size(-1), consumer.read.dilation[0]
        mean, covariance = moments_behind(model, graph, group, (size - 1) * step)
        columns = weight[:, places[:, 0]].flatten(1)  # (outputs, units * taps)
        patch = _patches(covariance, size, step)
        taps = weight[0, 0].numel()
    else:
        mean, covariance = moments_behind(model, graph, group, 0)
        # each tap and place on its own: they are rows of their own to the same covariance
        columns = weight.movedim(1, -1)[..., places].movedim(-1, 1).reshape(-1, group.size)
        patch, taps = covariance[0], 1
    index = torch.tensor([unit * taps + tap for unit in kept for tap in range(taps)])
    solved = _solve(columns, patch, index)
    before = ((columns @ patch) * columns).sum(1).reshape(weight.size(0), -1).sum(1)
    after = ((solved @ patch[index][:, index]) * solved).sum(1).reshape(weight.size(0), -1).sum(1)
    new = _write(weight, solved, places, kept, whole=taps > 1)
    stay, shares = places[kept].flatten(), _shares(graph, consumer)
    shift = _output_mean(new[:, stay], mean[kept].repeat_interleave(places.size(1)), shares)
    shift -= _output_mean(weight[:, places.flatten()], mean.repeat_interleave(places.size(1)), shares)
    return _Part(places.numel(), stay, new[:, stay], shift, before, after)


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
    number = {shift: i for i, shift in enumerate(shifts(2, (size - 1) * step))}
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
    model: nn.Module, graph: Graph, name: str, parts: Sequence[_Part], stays: Mapping[Any, Any]
) -> list[Refit]:
    """Return the values in the shapes that are left: the shift goes into the norm's running mean, or into the bias."""
    consumer: Any = model.get_submodule(name)
    weight = consumer.weight.detach().double().cpu().clone()
    for part in parts:
        weight[:, part.inputs] = part.weight
    rows, inputs = (
        torch.arange(weight.size(dim)) if found is None else torch.from_numpy(found)
        for dim, found in ((dim, stays.get((weight_of(name), dim))) for dim in (0, 1))
    )
    values = {"weight": weight[rows][:, inputs].to(consumer.weight)}
    shift = torch.stack([part.shift for part in parts]).sum(0)[rows]
    norm_name = norm_behind(model, graph, name)
    if norm_name is not None:
        norm: Any = model.get_submodule(norm_name)
        mean, variance = (kept[rows.to(kept.device)] for kept in (norm.running_mean, norm.running_var))
        whole = sum(part.size for part in parts) == weight.size(1)
        ratio = _variance_left(parts, norm.running_var.double().cpu(), whole)[rows]
        statistics = {
            "running_mean": mean + shift.to(mean),
            "running_var": variance * ratio.clamp(0.01, 100).to(variance),
        }
        return [Refit(name, values), Refit(norm_name, statistics)]
    if consumer.bias is not None:
        values["bias"] = consumer.bias.detach()[rows.to(consumer.bias.device)] - shift.to(consumer.bias)
    return [Refit(name, values)]


def _variance_left(parts: Sequence[_Part], variance: Tensor, whole: bool) -> Tensor:
    """Return the part of each output's `variance` that is left, `(outputs,)`.

    Of a consumer whose inputs are not `whole` in these parts, all that is known of the others is what they leave.
    """
    before, after = (torch.stack([getattr(p, when) for p in parts]).sum(0) for when in ("before", "after"))
    total = (before if whole else torch.maximum(before, variance)).clamp_min(1e-30)
    return 1 - (before - after) / total
