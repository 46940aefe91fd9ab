"""Second moments of what the layers behind a channel group read of it, and how much they make of each channel.

With `S` the covariance of the removed channels that the kept ones leave unexplained, a consumer with weights `W` loses
`tr(W^T W S)` of its output's variance. Divided by the variance of what its output becomes part of (a residual stream,
perhaps), that can be compared between layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.nn.attention import free_all
from prunekit.progress import counter
from prunekit.restoration.images import Inputs, bytes_per_image, in_batches, tensors_of
from prunekit.restoration.plain_layers import obstacle, reads
from prunekit.restoration.refit_targets import norm_behind
from prunekit.restoration.samples import LayerCall, outputs_at, positions, rows_of
from prunekit.restoration.streams import Watch, find_join, scale_of
from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.copying import copied
from prunekit.surgery.editing.compensation import places_of
from prunekit.surgery.execution.dispatch import unfused_attention

ROWS = 4000  # vectors of each layer's input for every 64 images, or fewer where these are all
BATCH = 64
MEMORY = 256 << 20  # bytes of activations


@dataclass(frozen=True)
class Reading:
    """`covariance` of a group's units and `gram`, the products of the weights that read them, each `(units, units)`.

    Units that are `width` channels wide, heads of attention, have as many rows and columns each, side by side.
    `gram` is divided by the variance of the consumers' outputs: `(gram * S).sum()` is the relative loss. Where that is
    `modelled`, not measured, it is wrong about layers of which hardly anything is left; where a norm `in_front` tells
    what the layer reads, it is right about which of its channels stand for which.
    """

    covariance: Tensor
    gram: Tensor
    modelled: bool = False
    in_front: bool = False
    width: int = 1


def gram_of(weight: Tensor, places: Tensor, scale: Tensor) -> Tensor:
    """Return `W^T W` between units, summed over outputs (times `scale`), kernel taps and places: `(units, units)`.

    `weight` has the dimension along which it reads last; `places` are those of each unit in it, `(units, places)`.
    """
    columns = weight.detach().double()
    columns = columns * scale.double().reshape(-1, *[1] * (columns.dim() - 1))
    flat = columns[..., places].movedim(-2, 0).flatten(1)  # (size, outputs * taps * places)
    return flat @ flat.t()


def measure(
    model: nn.Module, graph: Graph, groups: Sequence[ChannelGroup], images: Tensor | Inputs
) -> dict[str, Reading]:
    """Return the readings of these groups on `images`, by name; without those whose consumers cannot be watched."""
    model = copied(model).eval()  # the caller's keeps its mode and its running statistics
    free_all(model)  # as it was traced
    gauges = [_Gauge(model, graph, group, member) for group in groups for member in _readers(model, graph, group)]
    generator, count, done = torch.Generator().manual_seed(0), counter("measuring activations"), 0
    for batch in in_batches(images, max(1, min(BATCH, MEMORY // bytes_per_image(graph)))):
        rows = math.ceil(ROWS * len(batch) / min(BATCH, len(images)))
        with torch.no_grad(), unfused_attention(), _Reads(model, graph, gauges, rows, generator):
            model(*tensors_of(batch))
        done += len(batch)
        count(done, len(images))
    found: dict[str, Reading] = {}
    for group in groups:
        parts = [gauge for gauge in gauges if gauge.group is group and gauge.rows]
        if parts:
            gram = sum((part.gram() for part in parts[1:]), parts[0].gram())
            found[group.name] = Reading(parts[0].covariance(), gram, width=parts[0].width)
    return found


def shrunk(covariance: Tensor, rows: int) -> Tensor:
    """Return the covariance of `rows` vectors shrunk towards its diagonal, `(units, units)`.

    Of few vectors, channels seem to explain one another that do not. By the oracle approximating shrinkage of Chen,
    Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance Estimation" (IEEE Transactions on Signal
    Processing 58, 2010), equation 23, of the correlations.
    """
    deviations = covariance.diagonal().clamp_min(0).sqrt()
    varying = int((deviations > 0).sum())
    if varying < 2:
        return covariance
    correlations = covariance / torch.outer(deviations, deviations).clamp_min(1e-300)
    squares = float(correlations.square().sum())
    excess = (rows + 1 - 2 / varying) * (squares - varying)
    part = min(1.0, ((1 - 2 / varying) * squares + varying**2) / excess) if excess > 0 else 1.0
    return covariance - part * (covariance - covariance.diagonal().diag())


class _Reads(Watch):
    """Watch that shows gauges what their layers read and give."""

    def __init__(
        self, model: nn.Module, graph: Graph, gauges: Sequence[_Gauge], rows: int, generator: torch.Generator
    ) -> None:
        super().__init__(model, graph.nodes, [g.member.module for g in gauges], [g.join for g in gauges])
        self._gauges, self._rows, self._generator = gauges, rows, generator

    def after(self, layer: str, call: LayerCall, output: Tensor) -> None:
        """Show the gauges of this layer what it has read and given."""
        for gauge in self._gauges:
            if gauge.member.module == layer:
                gauge.read(call.x, self._rows, self._generator)
                gauge.give(output, self.take(gauge.join), self._rows, self._generator)


def _readers(model: nn.Module, graph: Graph, group: ChannelGroup) -> Iterable[Member]:
    for member in group.consumers:
        if obstacle(model, graph, member) is not None or len(set(member.units.tolist())) != group.size:
            continue
        if all(node.read is not None and node.read.groups == 1 for node in reads(graph, member.module)):
            yield member


class _Gauge:
    """Sums over what one consumer of a group reads, and over what it gives."""

    def __init__(self, model: nn.Module, graph: Graph, group: ChannelGroup, member: Member) -> None:
        self.group, self.member = group, member
        self.join = find_join(model, graph, member.module)
        self.weight = model.get_parameter(member.parameter)
        scale = scale_of(model, norm_behind(model, graph, member.module))
        self.scale = torch.where(scale.isfinite(), scale, 0.0)
        self.places = torch.from_numpy(places_of(member, group.size)).to(scale.device)
        self.width = self.places.size(1) if group.name in graph.heads else 1
        if self.width > 1:  # channels of their own, not places of one
            self.places = self.places.reshape(-1, 1)
        self.rows = 0
        self._first = self._second = self._given = torch.zeros((), dtype=torch.float64, device=scale.device)
        self._batches = 0

    def read(self, x: Tensor, most: int, generator: torch.Generator) -> None:
        """Note what the consumer reads, `most` vectors of it."""
        rows = outputs_at(x, positions(rows_of(x), most, generator))
        units = rows[:, self.places].transpose(1, 2).flatten(0, 1).double()  # (rows * places, units)
        self.rows += len(units)
        self._first = self._first + units.sum(0)
        self._second = self._second + units.t() @ units

    def give(self, output: Tensor, stream: Tensor | None, most: int, generator: torch.Generator) -> None:
        """Note what it gives, `most` vectors of it, and the stream that takes it."""
        where = positions(rows_of(output), most, generator)
        given = outputs_at(output, where) * self.scale
        if stream is not None and stream.numel() == output.numel():
            given = given + outputs_at(stream.reshape_as(output) if output.dim() == 2 else stream, where)
        self._given = self._given + given.double().var(0, correction=0).sum()
        self._batches += 1

    def covariance(self) -> Tensor:
        mean = self._first / self.rows
        return shrunk(self._second / self.rows - torch.outer(mean, mean), self.rows)

    def gram(self) -> Tensor:
        """Return the products of the weights, relative to the variance of the output."""
        gram = gram_of(self.weight.movedim(self.member.dim, -1), self.places, self.scale)
        return gram / (self._given / self._batches).clamp_min(1e-30)
