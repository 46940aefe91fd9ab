"""The network as surgery sees it: groups of channels, the parameters they sit in, and what each op costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from prunekit.errors import SurgeryError, unknown_name
from prunekit.surgery.graph.balance import Balancer
from prunekit.surgery.graph.groups import ChannelGroup
from prunekit.surgery.graph.inside import Inside
from prunekit.surgery.graph.labels import Ids, Mask
from prunekit.surgery.graph.recording import Node
from prunekit.surgery.graph.wiring import Wiring
from prunekit.surgery.ops import LAYER_OPS


@dataclass(frozen=True)
class LinkedNorm:
    """A batch norm that reads a shared stream: classes in front of it and behind it, place by place."""

    norm: str
    stream: Ids
    private: Ids


@dataclass(frozen=True)
class SelectedChannels:
    """Input of a `ChannelSelect`: places in what it reads, whose classes are `inputs`."""

    index: Ids
    inputs: Ids


@dataclass(frozen=True)
class FurtherPass:
    """A forward beside the first one: on another example, or in `training` mode.

    The example has its values, which the forward has needed if `real`.
    """

    example: tuple[Any, ...]
    nodes: tuple[Node, ...]
    normalised: Mapping[int, Ids]
    draws: tuple[Ids, ...]
    returned: frozenset[int]
    training: bool
    real: bool


@dataclass(frozen=True)
class Graph(Wiring):
    """One recorded network. Nothing in it refers to the network's weights.

    `slots` maps (parameter, dimension) to the class of each index; class 0 is no channel. `pads` maps `ChannelPad`
    modules to the classes of the zeros they add before and after; `normalised` maps the nodes that normalise across
    channels to the classes they normalise, and `widths` every norm module to those it sees. `heads` names the groups
    whose units are heads of attention, and `products` maps the nodes that multiply two activations head by head to the
    classes of the heads. `numbers` maps attributes,
    by module, name and place in it, that count channels or heads, to the classes of these. `draws` holds, for each op
    that draws random numbers, the classes of what it draws, of size 1 along dimensions without channels. `returned`
    are the values that the model returns. `shapes` are those of parameters and buffers; `example` is the input it was
    recorded with, on the meta device. `further` are the forwards that were recorded beside, and `never_ran` names the
    modules that none of them has reached, `plain` those that each of them calls once, with one tensor for one tensor.
    `inside` has the coordinates inside heads, where these were looked for: their groups are the last ones. `rigid` says
    why heads of a group have no other width.

    Examples:
        >>> import prunekit as pk
        >>> graph = pk.inspect(pk.load("prunekit:resnet20")).graph
        >>> graph.batch_norm_after("layer1.0.conv1")
        'layer1.0.bn1'
        >>> [graph.is_stream(graph.group(name)) for name in ("layer1.0.conv1", "layer3.0.conv2")]
        [False, True]
    """

    groups: tuple[ChannelGroup, ...]
    nodes: tuple[Node, ...]
    slots: Mapping[tuple[str, int], Ids]
    roles: Mapping[tuple[str, int], str]
    pads: Mapping[str, tuple[Ids, Ids]]
    links: tuple[LinkedNorm, ...]
    selections: Mapping[str, SelectedChannels]
    normalised: Mapping[int, Ids]
    widths: Mapping[str, Ids]
    heads: frozenset[str]
    products: Mapping[int, Ids]
    numbers: Mapping[str, Mapping[tuple[str, int | None], Ids]]
    draws: tuple[Ids, ...]
    returned: frozenset[int]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    group_of: Ids
    unit_of: Ids
    example: tuple[Any, ...]
    batch: int
    balancer: Balancer | None = None
    further: tuple[FurtherPass, ...] = ()
    never_ran: tuple[str, ...] = ()
    plain: frozenset[str] = frozenset()
    inside: Inside | None = None
    rigid: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """Results that have been worked out of this graph, by the function that remembers them."""
        return {}

    @property
    def example_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the example inputs, batch included."""
        return tuple(tuple(leaf.shape) for leaf in self.example if isinstance(leaf, Tensor))

    def on_further(self) -> Iterator[Graph]:
        """Yield the graph as each further example has it: the same channels, with that example's ops and values."""
        for run in self.further:
            if not run.training:
                own = {name: getattr(run, name) for name in ("example", "nodes", "normalised", "draws", "returned")}
                yield replace(self, **own, products={}, further=())

    def group(self, name: str) -> ChannelGroup:
        """Return the group of that name, or made by the layer or parameter of that name.

        Raises:
            SurgeryError: no such group, the nearest names are suggested; or several.
        """
        found = self._by_name.get(name, [])
        if not found:
            error = unknown_name("channel group", name, self._by_name)
            raise SurgeryError(error.message, hint=error.hint)
        free = [group for group in found if group.free]
        if len(free) == 1:
            return free[0]
        if len(found) > 1:
            raise SurgeryError(
                f"'{name}' makes several channel groups", hint="name one: " + ", ".join(group.name for group in found)
            )
        return found[0]

    @cached_property
    def _by_name(self) -> dict[str, list[ChannelGroup]]:
        names: dict[str, list[ChannelGroup]] = {}
        for group in self.groups:
            for name in dict.fromkeys(group.names()):
                names.setdefault(name, []).append(group)
        return {**names, **{group.name: [group] for group in self.groups}}

    def address(self, parameter: str) -> str:
        """Return what a plan calls the reader of channels whose weight is `parameter`: its module, if unambiguous."""
        module = parameter.rpartition(".")[0]
        return module if module and len(self._weights_of[module]) == 1 else parameter

    def weight_at(self, address: str) -> str:
        """Return the parameter that `address` stands for.

        Raises:
            SurgeryError: it reads no channels, or through several weights.
        """
        found = self._weights_of.get(address, [])
        if len(found) == 1:
            return found[0]
        if found:
            raise SurgeryError(
                f"'{address}' reads channels through several weights", hint="name one: " + ", ".join(found)
            )
        error = unknown_name("reader of channels", address, self._weights_of)
        raise SurgeryError(error.message, hint=error.hint)

    @cached_property
    def _weights_of(self) -> dict[str, list[str]]:
        """The weights that channels are read through, by their own names and by their modules'."""
        known = dict.fromkeys([*self._reads, *(name for (name, _), role in self.roles.items() if role == "in")])
        weights: dict[str, list[str]] = {}
        for weight in known:
            weights.setdefault(weight.rpartition(".")[0], []).append(weight)
        return {**weights, **{weight: [weight] for weight in known}}

    def reads(self, parameter: str) -> Sequence[Node]:
        """Return the nodes that read channels through a parameter, in execution order."""
        return self._reads.get(parameter, [])

    @cached_property
    def _reads(self) -> dict[str, list[Node]]:
        reads: dict[str, list[Node]] = {}
        for node in self.nodes:
            if node.read is not None:
                reads.setdefault(node.read.parameter, []).append(node)
        return reads

    def number(self, group: str) -> int:
        """Return the number of the group of that name."""
        return self._numbers[group]

    def classes_in(self, number: int) -> Ids:
        """Return the classes of a group, by its number, in ascending order."""
        return self._classes_in[number]

    @cached_property
    def _classes_in(self) -> list[Ids]:
        order = np.argsort(self.group_of, kind="stable")
        return np.split(order, np.searchsorted(self.group_of[order], np.arange(len(self.groups))))[1:]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {group.name: number for number, group in enumerate(self.groups)}

    def kept_classes(self, keeps: Mapping[str, Iterable[int]]) -> Mask:
        """Return whether each class stays, given the kept units of some groups by their names."""
        kept = np.ones(self.group_of.size, dtype=np.bool_)
        for name, units in keeps.items():
            number = self._numbers[name]
            stays = np.zeros(self.groups[number].size, dtype=np.bool_)
            stays[list(units)] = True
            if (width := self.width_at(number)) is not None and self.inside is not None:
                kept[self.inside.lost(width, stays)] = False
                continue
            members = self.classes_in(number)
            kept[members] &= stays[self.unit_of[members]]
        for link in self.links:  # what a stream loses, its readers lose
            kept[link.private[~kept[link.stream]]] = False
        return kept

    def width_at(self, number: int) -> int | None:
        """Return which of the widths inside heads a group is, by its number; None for channels and heads themselves."""
        first = len(self.groups) - (len(self.inside.widths) if self.inside else 0)
        return number - first if number >= first else None

    def kept_units(self, kept: Mask) -> dict[str, tuple[int, ...]]:
        """Return the kept units, by name, of every group that loses some."""
        if self.inside is not None:
            return self._kept_of_cells(kept, self.inside)
        gone = np.flatnonzero(~kept & (self.group_of >= 0))
        gone = gone[np.argsort(self.group_of[gone], kind="stable")]
        losing, starts = np.unique(self.group_of[gone], return_index=True)
        units = {}
        for number, classes in zip(losing, np.split(gone, starts[1:]), strict=False):  # nothing splits into one part
            stays = np.ones(self.groups[number].size, dtype=np.bool_)
            stays[self.unit_of[classes]] = False
            units[self.groups[number].name] = tuple(np.flatnonzero(stays).tolist())
        return units

    def _kept_of_cells(self, kept: Mask, inside: Inside) -> dict[str, tuple[int, ...]]:
        """Return the same where channels inside heads go in two ways: a unit stays where anything of it does."""
        units = {}
        for number, group in enumerate(self.groups):
            width = self.width_at(number)
            if width is None:
                members = self.classes_in(number)
                stays = np.zeros(group.size, dtype=np.bool_)
                stays[self.unit_of[members[kept[members]]]] = True
            else:
                stays = inside.left(width, kept)
            if not stays.all():
                units[group.name] = tuple(np.flatnonzero(stays).tolist())
        return units

    def kept_indices(self, kept: Mask) -> dict[tuple[str, int], Ids]:
        """Return the surviving indices of each parameter dimension that loses some, in the order of the result.

        Only networks with a `balancer` have another order than the original, or blank places, which are -1.
        """
        result = {} if self.balancer is None else self.balancer.indices(kept)
        for key, classes in self.slots.items():
            if key in result:
                continue
            stays = kept[classes]
            if not stays.all():
                result[key] = np.flatnonzero(stays)
        return result

    def balanced_groups(self) -> frozenset[str]:
        """Return the groups that must keep the same share of their channels as some others."""
        balances = self.balancer.balances if self.balancer else ()
        return frozenset(self.groups[number].name for balance in balances for number in balance.groups)

    def sizes(self, kept: Mask) -> dict[tuple[str, int], int]:
        """Return the number of indices that are left of each parameter dimension."""
        blank = {} if self.balancer is None else self.balancer.indices(kept)
        return {
            key: blank[key].size if key in blank else int(kept[classes].sum()) for key, classes in self.slots.items()
        }

    def is_stream(self, group: ChannelGroup) -> bool:
        """Return whether several layers add into these channels. Element-wise gates (no positions) do not count.

        Nor do queries, keys and values of the heads of attention.
        """
        if group.name in self.heads:
            return False
        with_positions = [m for m in group.producers if self._positions(m.module) > 1]
        return len(with_positions or group.producers) > 1

    def _positions(self, module: str) -> int:
        """Return how many places of one input a layer works on: pixels, or tokens."""
        sizes = [
            math.prod(node.shape[2:]) if node.op == "convolution" else math.prod(node.shape[:-1]) // self.batch
            for node in self.calls(module)
            if node.op in LAYER_OPS
        ]
        return max(sizes, default=1)

    def outputs(self) -> Iterator[tuple[str, int]]:
        """Yield the slots that are the output channels of a convolution or linear layer, depthwise ones included."""
        for (name, dim), role in self.roles.items():
            if len(self.shapes[name]) > 1 and (role == "out" or (role == "along" and dim == 0)):
                yield name, dim
