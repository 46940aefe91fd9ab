"""Sensitivity of each channel group: the score lost when it alone is pruned.

After Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), figure 2: the channels with the smallest filters
(L1 norm) are removed within one group at a time, nothing is restored, and the network is measured. With images to
restore from it is what `merge` goes by instead (`--widths measured`): the channels that explain most of what the next
layers read stay, these layers are refitted, and what the outputs lose is measured too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from prunekit import surgery
from prunekit.data import Examples
from prunekit.errors import InputError
from prunekit.evaluation.score import scored
from prunekit.methods.baselines.scores import filter_norms
from prunekit.methods.merge.selection import pivoted
from prunekit.methods.ranking import keep_after, removal_order
from prunekit.metric import ACCURACY, Metric
from prunekit.plan import Keep, Plan
from prunekit.progress import Progress, counter, report_progress
from prunekit.restoration.images import Images, gather
from prunekit.restoration.narrowed_alone import NarrowedAlone
from prunekit.restoration.second_moments import measure
from prunekit.surgery import ChannelGroup, Graph
from prunekit.tasks.sets import task_of

RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class GroupSensitivity:
    """One group: for each ratio, the number of channels removed and the score that is left.

    Where it was refitted, `loss` is the error of the network's outputs for each ratio, as a share of their variance.

    Examples:
        >>> import prunekit as pk
        >>> pk.GroupSensitivity("conv1", 16, (0.25, 0.5), (4, 8), (0.91, 0.62)).to_json()["accuracy"]
        [0.91, 0.62]
    """

    group: str
    channels: int
    ratios: tuple[float, ...]
    removed: tuple[int, ...]
    score: tuple[float, ...]
    loss: tuple[float, ...] | None = None
    metric: Metric = ACCURACY

    @property
    def accuracy(self) -> tuple[float, ...]:
        """The remaining accuracy; none where another score counts."""
        return self.score if self.metric == ACCURACY else ()

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        accuracy = {"accuracy": list(self.accuracy)} if self.metric == ACCURACY else {}
        return {**fields, "metric": self.metric.to_json(), **accuracy}


def sensitivity(
    model: nn.Module,
    graph: Graph,
    images: Examples,
    ratios: Sequence[float] = RATIOS,
    *,
    restore_from: Images | None = None,
    batch_size: int = 256,
    on_group: Progress | None = None,
) -> list[GroupSensitivity]:
    """Measure `model` once for every group that can lose channels and every ratio.

    Args:
        model: A network.
        graph: The graph that `trace` read from it.
        images: Labelled images, or the examples that a task has opened, to measure on.
        ratios: Shares of a group to remove, between 0 and 1.
        restore_from: Unlabelled, normalised images `(N, C, H, W)`, or batches of them, to which what reads the group is
            refitted before it is measured; None restores nothing.
        batch_size: Images per forward pass.
        on_group: Called after each group with the groups done and the groups in all.

    Returns:
        For each group, for each ratio, how many channels went, and the score that was left.

    Raises:
        InputError: A ratio is out of range, nothing can be pruned, or images that do not suit the network.

    Examples:
        >>> import prunekit as pk
        >>> model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
        >>> found = pk.sensitivity(model, pk.inspect(model).graph, pk.open_data("digits", "test"), [0.5])
        >>> [(group.channels, group.removed) for group in found]
        [(8, (4,)), (16, (8,))]
    """
    wrong = [ratio for ratio in ratios if not 0 < ratio < 1]
    if wrong or not ratios:
        raise InputError(f"ratios must lie between 0 and 1, both excluded; found {wrong[0] if wrong else 'none'}")
    groups = [group for group in graph.groups if len(group.free) > 1]
    if not groups:
        raise InputError("no channels of this model can be removed", hint="prunekit inspect says why")
    cut = _Plainly(model, graph) if restore_from is None else _Refitted(model, graph, groups, restore_from)
    found, count = [], on_group or counter("pruning one group at a time")
    for number, group in enumerate(groups, start=1):
        measured = [_measured(cut, group, ratio, images, batch_size) for ratio in ratios]
        removed, scores, losses = zip(*measured, strict=True)
        loss = None if restore_from is None else losses
        metric = task_of(images).metric
        found.append(GroupSensitivity(group.name, group.size, tuple(ratios), removed, scores, loss, metric))
        count(number, len(groups))
    return found


def _measured(
    cut: _Plainly | _Refitted, group: ChannelGroup, ratio: float, images: Examples, batch_size: int
) -> tuple[int, float, float]:
    """Return the number of channels removed from the group, the score without them, and the loss of the outputs."""
    with report_progress(None):  # groups are counted
        count, small, loss = cut(group, int(ratio * group.size))
        return count, scored(small, images, batch_size=batch_size).value, loss


class _Plainly:
    """Networks that lack the smallest filters of a group."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._model, self._graph = model, graph

    def __call__(self, group: ChannelGroup, count: int) -> tuple[int, nn.Module, float]:
        """Return how many channels can go, the network without them, and no loss."""
        removal = removal_order([group], {group.name: filter_norms(self._model, group)}, 1)
        count = min(count, len(removal.order))
        keeps = keep_after([group], removal, count)
        small = surgery.edit(self._model, Plan(Keep(name, index) for name, index in keeps.items()), self._graph)
        return count, small.eval(), 0.0


class _Refitted:
    """Networks of which a group keeps the channels that explain most, and what reads it is refitted."""

    def __init__(self, model: nn.Module, graph: Graph, groups: Sequence[ChannelGroup], images: Images) -> None:
        batch = gather(images, model, graph)
        self._model, self._alone = model, NarrowedAlone(model, graph, batch)
        self._readings = measure(model, graph, groups, batch)

    def __call__(self, group: ChannelGroup, count: int) -> tuple[int, nn.Module, float]:
        """Return how many channels can go, the network without them, and what its outputs lose."""
        reading = self._readings.get(group.name)
        order = pivoted(reading)[0] if reading else np.argsort(-filter_norms(self._model, group), kind="stable")
        gone = [int(unit) for unit in order[::-1] if unit not in group.frozen][: min(count, group.size - 1)]
        kept = sorted(set(range(group.size)).difference(gone))
        small = self._alone.network(group, kept)
        return len(gone), small, self._alone.loss(small)
