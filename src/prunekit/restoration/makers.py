"""The layers whose filters are the channels of a group, and what keeps the layers behind from making up for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.restoration.plain_layers import reads_grouped, weight_of
from prunekit.surgery import ChannelGroup, Graph, Member
from prunekit.surgery.editing.compensation import places_of


@dataclass(frozen=True)
class Maker:
    """The first layer that makes all channels of `group`: a filter for each unit.

    `member` is where the group sits in its weight: a unit may have several places, as in front of a pixel shuffle.
    `writes` is the weight through which heads of attention write, a column for each of their channels.
    """

    group: ChannelGroup
    member: Member
    module: nn.Module
    writes: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Filters, one for each unit: `(units, ...)`; of heads of attention what they write with."""
        if self.writes is not None:
            places = torch.from_numpy(places_of(self.group.consumers[0], self.group.size))
            return self.writes.detach().flatten(1).t()[places.to(self.writes.device)].flatten(1)
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return self.by_unit(weight)

    def by_unit(self, values: Tensor) -> Tensor:
        """Return what the layer holds for each output, `(C, ...)`, by units: `(units, ...)`."""
        places = torch.from_numpy(places_of(self.member, self.group.size))
        found = values.detach()[places.to(values.device)]  # (units, places, ...)
        return found.squeeze(1) if places.size(1) == 1 else found.flatten(1)


def maker_of(model: nn.Module, graph: Graph, group: ChannelGroup) -> Maker | str:
    """Return the layer that makes a group, or why there is none whose filters are its channels."""
    whole = (m for m in group.producers if len(np.unique(m.units)) == group.size)
    member = next(whole, group.producers[0])
    module = model.get_submodule(member.module)
    if group.name in graph.heads:
        reader = group.consumers[0] if len(group.consumers) == 1 else None
        if reader is None or reader.parameter != weight_of(reader.module) or reader.dim != 1:
            return "several layers read these heads"
        return Maker(group, member, module, model.get_parameter(reader.parameter))
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        return f"its channels come from a {type(module).__name__}"
    if member.parameter != weight_of(member.module) or member.dim != 0:
        return f"its channels come from '{member.parameter}', which is not the weight of a layer"
    places = np.bincount(member.units, minlength=group.size)
    if places.min() == 0 or member.units.size != graph.shapes[member.parameter][0]:
        return "no layer makes all of these channels"
    if places.min() != places.max():
        return "a layer makes some of these channels more often than others"
    return Maker(group, member, module) if group.consumers else "no layer reads these channels"


def norm_after(model: nn.Module, graph: Graph, layer: str) -> _BatchNorm | None:
    """Return the batch norm right behind a layer, or None."""
    name = graph.batch_norm_after(layer)
    norm = None if name is None else model.get_submodule(name)
    return norm if isinstance(norm, _BatchNorm) else None


def obstacle_to_readers(graph: Graph, group: ChannelGroup, *, plainly: bool = False) -> str | None:
    """Return why what reads a group's channels is no layer that could take over what goes from them alone, or None.

    With `plainly` it does not have to.
    """
    if graph.is_stream(group):
        return "several layers add into these channels"
    readers = [member.module for member in group.consumers]
    if not plainly and len(set(readers)) != len(readers):
        return f"'{max(readers, key=readers.count)}' reads these channels by several weights"
    return None


def obstacle_to_making_up(model: nn.Module, graph: Graph, group: ChannelGroup) -> str | None:
    """Return why a group's filters and their batch norm do not tell what its readers could take over, or None."""
    maker = maker_of(model, graph, group)
    reason = maker if isinstance(maker, str) else obstacle_to_readers(graph, group)
    if reason is not None:
        return reason
    if reads_grouped(graph, group):
        return "a grouped convolution reads these channels: making up for that takes images"
    own = group.producers[0]
    norm = graph.batch_norm_after(own.module)
    if norm is not None and own.units.size != group.size:
        return "blocks of channels go together, each with statistics of its own: making up for that takes images"
    if len(group.producers) != 1:
        return f"'{group.producers[-1].module}' scales these channels: making up for that takes images"
    if norm is not None and norm_after(model, graph, own.module) is None:
        return f"'{norm}' is no batch norm that is known"
    return None
