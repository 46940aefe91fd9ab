"""Plan of a surgery: a frozen list of operations on channel groups and layers.

A method returns a `Plan`; `prunekit.surgery.editing` applies it to a copy of the network. Operations address groups and
layers by dotted names: that of the module, or of the parameter where one module has several that would match. The JSON
form holds the structure alone: values of folds and refits are in the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Keep:
    """Removal of all channels of `group` but `index`, from every layer that makes or reads them.

    `group` is the name of a channel group, or of any layer or parameter that makes exactly the group's channels. Groups
    are named after the module that makes them; where that makes several, after the parameter.

    None may stay where the channels are inside of a residual block, `activation(x + branch(x))`, whose branch then
    gives the same for every input: the block goes as a whole, and adds this constant alone. A fold into the last layer
    of the branch says what the constant is to be.

    Args:
        group: The group's name.
        index: Its units that stay, from 0; any order, none twice.

    Examples:
        >>> import prunekit as pk
        >>> pk.Keep("layer1.0.conv1", range(0, 16, 4))
        Keep(group='layer1.0.conv1', index=(0, 4, 8, 12))
    """

    group: str
    index: tuple[int, ...]

    def __init__(self, group: str, index: Iterable[int]) -> None:
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "index", tuple(int(i) for i in index))


@dataclass(frozen=True, eq=False)
class Fold:
    """Compensation for removed inputs: `consumer` reads them as `x_r ~ A x_k + b` and absorbs both terms.

    `consumer` is the module's name if it reads through one weight, else that of the parameter (`Graph.address`).
    `matrix` is `A`, of shape `(removed, kept)` over the units of `group`, both ascending; None for zero.
    `offset` is `b` over all input channels (features) of the consumer, zero where a channel stays; None for zero.
    `W_k += W_r A`; `W b`, summed over the kernel, goes into the consumer's bias, or into the running mean of the batch
    norm behind it, or into a bias that is made for it. A constant that none of these can carry is refused.

    Examples:
        Channel 2 of a layer is always the mean of the other two, and the next layer shall read it so:

        >>> import torch, prunekit as pk
        >>> first, second = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 4, 1)
        >>> with torch.no_grad():
        ...     _ = first.weight[2].copy_(first.weight[:2].mean(0)), first.bias[2].copy_(first.bias[:2].mean())
        >>> model, x = torch.nn.Sequential(first, second), torch.rand(1, 3, 8, 8)
        >>> fold = pk.Fold("1", "0", matrix=torch.tensor([[0.5, 0.5]]))
        >>> small = pk.apply(model, pk.Plan([pk.Keep("0", [0, 1]), fold]), x)
        >>> torch.allclose(small(x), model(x), atol=1e-6)
        True
    """

    consumer: str
    group: str
    matrix: Tensor | None = None
    offset: Tensor | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the structure, without values."""
        return {
            "consumer": self.consumer,
            "group": self.group,
            "merges": 0 if self.matrix is None else int((self.matrix != 0).any(dim=1).sum()),
            "offset": self.offset is not None,
        }


@dataclass(frozen=True, eq=False)
class Refit:
    """New values, in the shapes after the removal, for parameters and buffers of a layer that stays.

    A refit takes precedence: a fold into a tensor that is refitted is void. `values` maps names within the module, such
    as `weight` or `running_mean`, to tensors.

    Args:
        layer: The module's name.
        values: The new tensors by their names within it.

    Examples:
        >>> import torch, prunekit as pk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 1))
        >>> plan = pk.Plan([pk.Keep("0", [0, 1]), pk.Refit("1", {"weight": torch.ones(4, 2, 1, 1)})])
        >>> pk.apply(model, plan, torch.zeros(1, 3, 8, 8))[1].weight.detach().unique()
        tensor([1.])
    """

    layer: str
    values: Mapping[str, Tensor]

    def to_json(self) -> dict[str, Any]:
        """Return the structure, without values."""
        return {"layer": self.layer, "values": sorted(self.values)}


@dataclass(frozen=True)
class Gate:
    """Gates on the output channels of `conv`, driven by its input (Tang et al., CVPR 2021); nothing is removed.

    The output of its batch norm is scaled by a saliency that a small network predicts; channels below a threshold are
    zero. `norm` is the batch norm behind the convolution. `before` names modules in front of it, in order, that are
    gated with it: the expansion in front of a depthwise convolution. All move into one module in the convolution's
    place. `hidden` is the width of the predicting network; `rectified` says that a ReLU follows. At the start every
    saliency is one: the network's outputs are unchanged.

    Examples:
        >>> import torch, prunekit as pk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        ...                             torch.nn.Conv2d(8, 4, 1)).eval()
        >>> gated = pk.apply(model, pk.Plan([pk.Gate("0", "1", rectified=True)]), torch.zeros(1, 3, 8, 8))
        >>> type(gated[0]).__name__
        'GatedConv'
    """

    conv: str
    norm: str
    before: tuple[str, ...] = ()
    hidden: int = 1
    rectified: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return all fields; `Gate(**json)` reads them back."""
        return {**vars(self), "before": list(self.before)}


Operation = Keep | Fold | Refit | Gate


@dataclass(frozen=True)
class Plan:
    """Operations to apply together, with notes of the method that made them.

    `notes` is JSON: which layers were protected, how many neurons were merged, and the like. `example` holds the shapes
    of the inputs that the network was traced with, batch included; empty when unknown.

    Args:
        operations: What is to be done, in any order.
        notes: What the method that made them has to say, as JSON.
        example: Shapes of the inputs that the network was read with.

    Examples:
        >>> import prunekit as pk
        >>> plan = pk.Plan([pk.Keep("layer1.0.conv1", range(8))], {"reason": "the first half is enough"})
        >>> plan.to_json()["keep"]
        {'layer1.0.conv1': [[0, 7]]}
        >>> pk.Plan.from_json(plan.to_json()).keeps == plan.keeps
        True
    """

    operations: tuple[Operation, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    example: tuple[tuple[int, ...], ...] = ()

    def __init__(
        self,
        operations: Iterable[Operation] = (),
        notes: Mapping[str, Any] | None = None,
        example: Iterable[tuple[int, ...]] = (),
    ) -> None:
        object.__setattr__(self, "operations", tuple(operations))
        object.__setattr__(self, "notes", dict(notes or {}))
        object.__setattr__(self, "example", tuple(example))

    def made_on(self, example: Iterable[tuple[int, ...]]) -> Plan:
        """Return the same plan with the shapes of the inputs that it was made on."""
        return Plan(self.operations, self.notes, example)

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.operations)

    @property
    def keeps(self) -> tuple[Keep, ...]:
        """The removals, given by the channels that stay."""
        return tuple(op for op in self.operations if isinstance(op, Keep))

    @property
    def folds(self) -> tuple[Fold, ...]:
        """The compensations."""
        return tuple(op for op in self.operations if isinstance(op, Fold))

    @property
    def refits(self) -> tuple[Refit, ...]:
        """The new values for layers that stay."""
        return tuple(op for op in self.operations if isinstance(op, Refit))

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The layers that get gates."""
        return tuple(op for op in self.operations if isinstance(op, Gate))

    def to_json(self) -> dict[str, Any]:
        """Return the structure as JSON; `from_json` reads removals and gates back."""
        return {
            "keep": {keep.group: _runs(keep.index) for keep in self.keeps},
            "fold": [fold.to_json() for fold in self.folds],
            "refit": [refit.to_json() for refit in self.refits],
            "gate": [gate.to_json() for gate in self.gates],
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read removals and gates of a plan that `to_json` wrote; the values of folds and refits are not in JSON."""
        keeps = [Keep(group, _unrun(runs)) for group, runs in data["keep"].items()]
        gates = [Gate(**{**gate, "before": tuple(gate["before"])}) for gate in data.get("gate", ())]
        return cls([*keeps, *gates], data.get("notes"))


def _runs(index: Sequence[int]) -> list[list[int]]:
    """Return ascending numbers as inclusive runs: `[0, 1, 2, 7]` -> `[[0, 2], [7, 7]]`."""
    runs: list[list[int]] = []
    for i in index:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return runs


def _unrun(runs: Iterable[Sequence[int]]) -> list[int]:
    return [i for first, last in runs for i in range(first, last + 1)]
