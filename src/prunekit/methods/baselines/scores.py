"""Scores of channels: the norm of their filters, and their effect on the loss to first order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from prunekit.devices import device_of
from prunekit.errors import InputError
from prunekit.restoration.images import Images, LabelledImages
from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.copying import copied


def filter_norms(model: nn.Module, group: ChannelGroup) -> NDArray[np.float64]:
    """Return the L1 norm of the filters that make each channel, summed over its producers: `(group size,)`."""
    norms = np.zeros(group.size)
    for member in group.producers:
        weight = model.get_parameter(member.parameter).detach().double().abs()
        _add(norms, member, _by_channel(weight, member))
    return norms


def norm_ranks(model: nn.Module, graph: Graph) -> dict[str, NDArray[np.float64]]:
    """Return the place of each channel among those of its group by L1 norm, from 0 to 1.

    Norms of different layers say nothing about each other, so that each layer loses the same share of its filters (Li
    et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.1).
    """
    ranks = {}
    for group in graph.groups:
        places = np.argsort(np.argsort(filter_norms(model, group), kind="stable"), kind="stable")
        ranks[group.name] = (places + 0.5) / group.size
    return ranks


def taylor_scores(
    model: nn.Module, graph: Graph, images: Images | LabelledImages | None
) -> dict[str, NDArray[np.float64]]:
    """Return how much the loss changes, to first order, when a channel becomes zero, squared.

    Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019): a gate of 1 behind the batch norm
    of a channel has the gradient `gamma dE/dgamma + beta dE/dbeta`, the sum of gradient times weight over its
    parameters; where no batch norm follows, those of its filter. It is squared for each batch, and averaged over
    batches; the layers that coupled channels have are added up.

    Args:
        model: A classifier; it stays unchanged.
        graph: The graph that `trace` read from it.
        images: Batches of normalised images `(N, C, H, W)` and their labels `(N,)`.

    Raises:
        InputError: There are no labelled images.
    """
    subject = copied(model).eval()
    members = {group.name: _gates(subject, group) for group in graph.groups}
    totals = {group.name: np.zeros(group.size) for group in graph.groups}
    batches, device = 0, device_of(subject)
    for inputs, labels in _labelled(images):
        with _gradients(subject):
            torch.autograd.backward(functional.cross_entropy(subject(inputs.to(device)), labels.to(device)))
            for group in graph.groups:
                totals[group.name] += _squared(subject, group, members[group.name])
        batches += 1
    if not batches:
        raise _without_labels()
    return {name: total / batches for name, total in totals.items()}


def _labelled(images: Images | LabelledImages | None) -> Iterable[tuple[Tensor, Tensor]]:
    if images is None or isinstance(images, Tensor):
        raise _without_labels()
    for batch in images:
        if isinstance(batch, Tensor) or len(batch) != 2:
            raise _without_labels()
        yield batch


def _without_labels() -> InputError:
    return InputError(
        "taylor reads the loss on labelled images, and there are none",
        hint="name a data set or a folder with --data (from Python: images=batches of images and labels)",
    )


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Let `backward` fill the gradients of all parameters, and forget them afterwards."""
    with torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    model.zero_grad(set_to_none=True)


def _gates(model: nn.Module, group: ChannelGroup) -> dict[str, list[Member]]:
    """Return, by module, the members that scale the channels of a group last: followers, or else the producers."""
    parameters = dict(model.named_parameters())
    followers = [member for member in group.followers if member.parameter in parameters]
    made = {member.module for member in group.producers}
    scaling = [member for member in followers if member.module not in made]
    gates: dict[str, list[Member]] = defaultdict(list)
    for member in scaling or (*group.producers, *followers):
        gates[member.module].append(member)
    return dict(gates)


def _squared(model: nn.Module, group: ChannelGroup, gates: dict[str, list[Member]]) -> NDArray[np.float64]:
    """Return the squared gradient of each channel's gate, summed over the modules that have one: `(group size,)`."""
    total = np.zeros(group.size)
    for members in gates.values():
        gradient = np.zeros(group.size)
        for member in members:
            weight = model.get_parameter(member.parameter)
            if weight.grad is not None:
                _add(gradient, member, _by_channel((weight.grad * weight).detach().double(), member))
        total += gradient**2
    return total


def _by_channel(weight: Tensor, member: Member) -> NDArray[np.float64]:
    """Return the sum over all but the dimension of the member's channels."""
    moved = weight.movedim(member.dim, 0)
    sums: NDArray[np.float64] = moved.reshape(moved.shape[0], -1).sum(1).cpu().numpy()
    return sums


def _add(total: NDArray[np.float64], member: Member, values: NDArray[np.float64]) -> None:
    """Add the values of a member's positions to its units, in place."""
    np.add.at(total, member.units, values[member.positions])
