"""What a recorded forward has told: operations, parameters, and facts about channel labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from prunekit.surgery.labels import Ledger, channels_in


@dataclass(frozen=True)
class ParameterView:
    """A parameter or buffer seen through `t`, `permute`, `expand` or added dimensions.

    `dims[i]` is the parameter's own dimension behind dimension `i` of the view, None for an added one, of one entry or
    of many that are alike.
    """

    name: str
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class WeightRead:
    """How an op reads channels through a parameter: which dimension of it, and what is added to the result.

    `bias` names the parameter that is added; `computed` says that something else is. `stride`, `transposed` and
    `groups` are those of a convolution.
    """

    parameter: str
    dim: int
    bias: str | None = None
    computed: bool = False
    stride: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1


@dataclass(frozen=True)
class Node:
    """One recorded operation. `inputs` and `outputs` number the values (tensors that are not parameters)."""

    index: int
    op: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: tuple[str, ...]
    macs: int
    shape: tuple[int, ...]
    read: WeightRead | None = None


@dataclass(frozen=True)
class Flow:
    """The labels that arrive at a node and leave it; None for a result that is a view of a parameter."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor | None, ...]

    @property
    def passes_on(self) -> bool:
        """Whether what leaves has channels of what arrives, and no others: activations, pooling, views."""
        if not self.inputs or not self.outputs or self.outputs[0] is None:
            return False
        leaving = channels_in(self.outputs[0])
        return leaving.size > 0 and bool(np.isin(leaving, channels_in(self.inputs[0])).all())


@dataclass
class Call:
    """An op as the rules see it: its arguments, its results, and the module whose forward ran it."""

    op: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: list[Tensor]
    where: str

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name, however it was given."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return [*tensors_in(self.args), *tensors_in(self.kwargs.values())]


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among an op's arguments or results, one level of lists deep: ATen nests no further."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


@dataclass
class Slot:
    """One dimension of one parameter, with a label for each index along it.

    `role` is "out" (the layer makes these channels), "in" (it reads them) or "along" (batch norm, scales, biases).
    """

    parameter: str
    dim: int
    role: str
    labels: Tensor


@dataclass
class Pad:
    """The zero channels that a `ChannelPad` module adds: labels before and after its input's."""

    module: str
    before: Tensor
    after: Tensor


@dataclass
class Link:
    """A batch norm that reads a shared stream: it may lose channels that the stream keeps for its other readers.

    `private` labels the channels behind the norm, `stream` those in front of it, place by place: what goes from the
    stream goes behind the norm too, but not the other way round. `reads` are the values that the norm was called on.
    """

    scale: str
    stream: Tensor
    private: Tensor
    reads: list[int] = field(default_factory=list)

    @property
    def norm(self) -> str:
        """The batch norm's module."""
        return self.scale.rpartition(".")[0]


@dataclass
class Selection:
    """A `ChannelSelect` module: which of its input's channels it reads."""

    module: str
    index: Tensor
    inputs: Tensor


@dataclass
class Recording:
    """Everything that one or more recorded forwards have told."""

    shapes: Mapping[str, tuple[int, ...]]  # of parameters and buffers
    parameters: frozenset[str]
    ledger: Ledger = field(default_factory=Ledger)
    nodes: list[Node] = field(default_factory=list)
    flow: list[Flow] = field(default_factory=list)  # one for each node
    slots: dict[tuple[str, int], Slot] = field(default_factory=dict)
    pads: dict[str, Pad] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    selections: dict[str, Selection] = field(default_factory=dict)
    normalised: dict[int, Tensor] = field(default_factory=dict)  # by node: the labels that it mixes
    widths: dict[str, Tensor] = field(default_factory=dict)  # by module: the channels that it normalises
    used: set[str] = field(default_factory=set)
    draws: dict[int, Tensor] = field(default_factory=dict)  # by node that draws random numbers: the labels of these
    returned: set[int] = field(default_factory=set)  # the values that the model returns

    def slot(self, parameter: str, dim: int, role: str, labels: Tensor) -> Tensor:
        """Say that index `i` of `parameter` along `dim` is channel `labels[i]`; returns the slot's labels."""
        key = (parameter, dim)
        known = self.slots.get(key)
        if known is None:
            self.slots[key] = Slot(parameter, dim, role, labels)
            return labels
        if known.labels.shape == labels.shape:
            self.ledger.unify(known.labels, labels)
        if role == "out":
            known.role = "out"
        return known.labels

    def produced(self, parameter: str, dim: int, size: int) -> Tensor:
        """The labels of the channels that `parameter` makes, the same ones each time the layer is called."""
        known = self.slots.get((parameter, dim))
        return self.slot(parameter, dim, "out", known.labels if known else self.ledger.fresh(size))
