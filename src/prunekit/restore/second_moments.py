"""What the layers behind a channel group read of it: second moments, and how much they make of each channel.

With `S` the covariance of the removed channels that the kept ones leave unexplained, a consumer with weights `W` loses
`tr(W^T W S)` of its output's variance. Divided by the variance of what its output becomes part of (a residual stream,
perhaps), that can be compared between layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.restore.plain_layers import given, obstacle
from prunekit.restore.refit_targets import norm_behind
from prunekit.restore.streams import Watch, find_join, scale_of
from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.copying import copied
from prunekit.surgery.editing.compensation import places_of
from prunekit.surgery.execution.hooks import hooked

ROWS = 4000  # vectors of each layer's input, a batch
BATCH = 64


@dataclass(frozen=True)
class Reading:
    """`covariance` of a group's units and `gram`, the products of the weights that read them, each `(units, units)`.

    `gram` is divided by the variance of the consumers' outputs: `(gram * S).sum()` is the relative loss. Where that is
    `modelled`, not measured, it is wrong about layers of which hardly anything is left.
    """

    covariance: Tensor
    gram: Tensor
    modelled: bool = False


def gram_of(weight: Tensor, member: Member, size: int, scale: Tensor) -> Tensor:
    """`W^T W` between units, summed over outputs (each times `scale`), kernel taps and places: `(size, size)`."""
    columns = weight.detach().double().movedim(member.dim, -1)
    columns = columns * scale.double().reshape(-1, *[1] * (columns.dim() - 1))
    places = torch.from_numpy(places_of(member, size)).to(weight.device)
    flat = columns[..., places].movedim(-2, 0).flatten(1)  # (size, outputs * taps * places)
    return flat @ flat.t()


def measure(model: nn.Module, graph: Graph, groups: Sequence[ChannelGroup], batch: Tensor) -> dict[str, Reading]:
    """The readings of these groups on `batch`, by name; without those whose consumers cannot be watched."""
    model = copied(model).eval()  # the caller's keeps its mode and its running statistics
    gauges = [_Gauge(model, graph, group, member) for group in groups for member in _readers(model, graph, group)]
    generator = torch.Generator().manual_seed(0)
    for images in torch.split(batch, BATCH):
        watch = Watch(graph, [gauge.join for gauge in gauges])
        with hooked(gauge.attach(watch, generator) for gauge in gauges), torch.no_grad(), watch:
            model(images)
    found: dict[str, Reading] = {}
    for group in groups:
        parts = [gauge for gauge in gauges if gauge.group is group and gauge.rows]
        if parts:
            gram = sum((part.gram() for part in parts[1:]), parts[0].gram())
            found[group.name] = Reading(parts[0].covariance(), gram)
    return found


def _readers(model: nn.Module, graph: Graph, group: ChannelGroup) -> Iterable[Member]:
    for member in group.consumers:
        if obstacle(model, graph, member) is not None or len(set(member.units.tolist())) != group.size:
            continue
        if getattr(model.get_submodule(member.module), "groups", 1) == 1:
            yield member


class _Gauge:
    """Sums over what one consumer of a group reads, and over what it gives."""

    def __init__(self, model: nn.Module, graph: Graph, group: ChannelGroup, member: Member) -> None:
        self.group, self.member = group, member
        self.join = find_join(model, graph, member.module)
        self.layer: Any = model.get_submodule(member.module)
        scale = scale_of(model, norm_behind(model, graph, member.module))
        self.scale = torch.where(scale.isfinite(), scale, 0.0)
        self.places = torch.from_numpy(places_of(member, group.size)).to(scale.device)
        self.rows = 0
        self._first = self._second = self._given = torch.zeros((), dtype=torch.float64, device=scale.device)
        self._batches = 0

    def attach(self, watch: Watch, generator: torch.Generator) -> Any:
        """A hook for one forward pass."""

        def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            with watch.aside():
                self._read(given(args, kwargs), generator)
                self._give(layer, output, watch.take(self.join))

        return self.layer.register_forward_hook(hook, with_kwargs=True)

    def _read(self, x: Tensor, generator: torch.Generator) -> None:
        rows = x.flatten(0, -2) if isinstance(self.layer, nn.Linear) else x.movedim(1, -1).flatten(0, -2)
        if len(rows) > ROWS:
            rows = rows[torch.randint(len(rows), (ROWS,), generator=generator).to(rows.device)]
        units = rows[:, self.places].transpose(1, 2).flatten(0, 1).double()  # (rows * places, units)
        self.rows += len(units)
        self._first = self._first + units.sum(0)
        self._second = self._second + units.t() @ units

    def _give(self, layer: Any, output: Tensor, stream: Tensor | None) -> None:
        channels = -1 if isinstance(layer, nn.Linear) else 1
        given = output.movedim(channels, -1) * self.scale
        if stream is not None and stream.shape == output.shape:
            given = given + stream.movedim(channels, -1)
        self._given = self._given + given.flatten(0, -2).double().var(0, correction=0).sum()
        self._batches += 1

    def covariance(self) -> Tensor:
        mean = self._first / self.rows
        return self._second / self.rows - torch.outer(mean, mean)

    def gram(self) -> Tensor:
        """Relative to the variance of the output."""
        weight = getattr(self.layer, "weight")  # noqa: B009
        gram = gram_of(weight, self.member, self.group.size, self.scale)
        return gram / (self._given / self._batches).clamp_min(1e-30)
