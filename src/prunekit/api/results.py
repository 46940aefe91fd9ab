"""Results that the functions of the Python face return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prunekit.plan import Plan
from prunekit.surgery import ChannelGroup, Cost, Graph


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect` on a network.

    Attributes:
        graph: The recorded network: what methods and plans work on.
        cost: Parameters and multiply-accumulates (MACs) for one input, in all and layer by layer.

    Examples:
        >>> import prunekit as pk
        >>> found = pk.inspect(pk.load("prunekit:resnet20"))
        >>> found.cost.macs, len(found.cost.layers), len(found.groups)
        (40551040, 39, 11)
        >>> found.groups[1].name, found.groups[1].size
        ('layer1.0.conv1', 16)
    """

    graph: Graph = field(repr=False)
    cost: Cost

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The channel groups, in execution order."""
        return self.graph.groups


@dataclass(frozen=True)
class Pruned:
    """A finished surgery; `slim`, `merge` and `prune` return it. It unpacks: `model, plan = pk.slim(...)`.

    Attributes:
        model: The new network. The one that was given is as it was.
        plan: What was done; `apply` does it again.
        graph: The network that was given, as it was recorded.
        before: Its cost: parameters, and multiply-accumulates (MACs) for one input.
        after: The cost of `model`.
        difference: The largest difference between the outputs of the masked original and of `model` on random inputs,
            relative to the largest output: the proof.
        seconds: Wall time of tracing, planning and editing.
        verify_seconds: Wall time of the proof.

    Examples:
        >>> import prunekit as pk
        >>> done = pk.slim(pk.load("prunekit:vgg_digits"), ratio=0.5)
        >>> done.after.channels < done.before.channels
        True
        >>> small, plan = done
        >>> small is done.model and plan is done.plan
        True
    """

    model: nn.Module
    plan: Plan
    graph: Graph = field(repr=False)
    before: Cost
    after: Cost
    difference: float
    seconds: float
    verify_seconds: float

    def __iter__(self) -> Iterator[Any]:
        """Yield the model, then the plan."""
        return iter((self.model, self.plan))
