"""Results of a recorded forward: operations, parameters, and facts about channel labels."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.surgery.graph.labels import Ids, channels_in
from prunekit.surgery.graph.ledger import Ledger


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
    """Reading of channels through a parameter: which dimension of it an op reads, and what is added to the result.

    `bias` names the parameter that is added; `computed` says that something else is. What follows is that
    of a convolution.
    """

    parameter: str
    dim: int
    bias: str | None = None
    computed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1


@dataclass(frozen=True)
class Node:
    """One recorded operation. `inputs` and `outputs` number the values (tensors that are not parameters).

    `module` is the one whose forward ran it, the innermost of `modules`. `settings` are the
    arguments beside tensors, by name, of what works element by element, and of padding.
    """

    index: int
    op: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: tuple[str, ...]
    macs: int
    shape: tuple[int, ...]
    read: WeightRead | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flow:
    """The labels that arrive at a node and leave it; None for a result that is a view of a parameter.

    `numbers` are those that the code gave to the op beside tensors, or took from it, and that no width should change.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor | None, ...]
    numbers: tuple[float, ...] = ()

    @property
    def passes_on(self) -> bool:
        """True where what leaves has channels of what arrives, and no others: activations, pooling, views."""
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
        """Return an argument by position or by name, however it was given."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return [*tensors_in(self.args), *tensors_in(self.kwargs.values())]


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among an op's arguments or results, one level of lists deep: ATen nests no further."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def numbers_of(op: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, ...]:
    """Return the numbers an op computes with, or gives to the code. Integers count only where they cannot be sizes."""
    if op == "_local_scalar_dense":
        return (out,)
    if op == "lift_fresh":  # a constant that the code has made
        return (args[0].item(),) if args[0].numel() == 1 and not args[0].is_meta else ()
    kinds = _counted(func)
    found = [value for value in args if type(value) in kinds]
    return (*found, *(value for value in kwargs.values() if type(value) in kinds))


def settings_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments beside tensors, by name, of what works element by element, and of padding."""
    if torch.Tag.pointwise not in func.tags and func.overloadpacket.__name__ != "constant_pad_nd":
        return {}
    named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
    return {name: value for name, value in (*named, *kwargs.items()) if not isinstance(value, Tensor)}


@functools.cache
def _counted(func: Any) -> tuple[type, ...]:
    fills = ("full", "full_like", "new_full", "fill", "scalar_tensor")
    computes = torch.Tag.pointwise in func.tags or func.overloadpacket.__name__.rstrip("_") in fills
    return (float, int) if computes else (float,)


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
class Pass:
    """One recorded forward: its inputs, its mode, whether it had values, and what happened; `complete` at its end."""

    inputs: tuple[Any, ...]
    training: bool
    real: bool
    nodes: list[Node] = field(default_factory=list)
    flow: list[Flow] = field(default_factory=list)  # one for each node
    normalised: dict[int, Tensor] = field(default_factory=dict)  # by node: the labels that it mixes
    products: dict[int, Tensor] = field(default_factory=dict)  # by node: the labels of the heads that it computes
    draws: dict[int, Tensor] = field(default_factory=dict)  # by node that draws random numbers: the labels of these
    returned: set[int] = field(default_factory=set)  # the values that the model returns
    complete: bool = False


@dataclass(frozen=True)
class HeadProduct:
    """A product of two activations, head by head, that leaves the coordinates inside the heads apart.

    `left` and `right` are the labels that are summed over in pairs, `(heads, width)`: queries and keys. For a product
    of weights and values they are the values, once, which the result has too. `heads` are the labels of the result's
    heads.
    """

    node: int
    run: int  # the number of the pass
    left: Tensor
    right: Tensor | None
    heads: Tensor


@dataclass
class Recording:
    """Everything that one or more recorded forwards have told."""

    shapes: Mapping[str, tuple[int, ...]]  # of parameters and buffers
    parameters: frozenset[str]
    ledger: Ledger = field(default_factory=Ledger)
    passes: list[Pass] = field(default_factory=list)  # the first is the one that costs are counted by
    slots: dict[tuple[str, int], Slot] = field(default_factory=dict)
    pads: dict[str, Pad] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    selections: dict[str, Selection] = field(default_factory=dict)
    widths: dict[str, Tensor] = field(default_factory=dict)  # by module: the channels that it normalises
    # by module, attribute and place in it: the channels that a number of the module's own counts
    numbers: dict[str, dict[tuple[str, int | None], Tensor]] = field(default_factory=dict)
    heads: list[Ids] = field(default_factory=list)  # the labels of heads of attention
    plain: dict[str, bool] = field(
        default_factory=dict
    )  # by module: whether each pass called it once, tensor to tensor
    inside: list[HeadProduct] = field(default_factory=list)  # products that could do with narrower heads
    used: set[str] = field(default_factory=set)

    @property
    def nodes(self) -> list[Node]:
        """The ops of the latest pass."""
        return self.passes[-1].nodes

    @property
    def flow(self) -> list[Flow]:
        """The labels around the ops of the latest pass."""
        return self.passes[-1].flow

    @property
    def normalised(self) -> dict[int, Tensor]:
        """The labels that the norms of the latest pass mix, by the number of the node."""
        return self.passes[-1].normalised

    @property
    def draws(self) -> dict[int, Tensor]:
        """The labels of what the latest pass draws at random, by the number of the node."""
        return self.passes[-1].draws

    @property
    def returned(self) -> set[int]:
        """The values that the latest pass returns."""
        return self.passes[-1].returned

    def slot(self, parameter: str, dim: int, role: str, labels: Tensor) -> Tensor:
        """Record that index `i` of `parameter` along `dim` is channel `labels[i]`; return the slot's labels."""
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

    def join(self, scale: str) -> None:
        """Let a batch norm that was thought to read a stream share the channels in front of it after all."""
        link = self.links.pop(scale)
        self.ledger.unify(link.stream, link.private)
        self.slots[scale, 0].role = "along"

    def produced(self, parameter: str, dim: int, size: int) -> Tensor:
        """Return the labels of the channels that `parameter` makes, the same ones each time the layer is called."""
        known = self.slots.get((parameter, dim))
        return self.slot(parameter, dim, "out", known.labels if known else self.ledger.fresh(size))
