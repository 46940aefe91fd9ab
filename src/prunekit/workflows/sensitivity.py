"""Sensitivity of each channel group: the accuracy lost when it alone is pruned.

After Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), figure 2: the channels with the smallest filters
(L1 norm) are removed within one group at a time, nothing is restored, and the network is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit import surgery
from prunekit.data import ImageSet
from prunekit.errors import InputError
from prunekit.evaluation.score import accuracy
from prunekit.methods.baselines.scores import filter_norms
from prunekit.methods.ranking import keep_after, removal_order
from prunekit.plan import Keep, Plan
from prunekit.progress import Progress, counter, report_progress
from prunekit.surgery import ChannelGroup, Graph

RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class GroupSensitivity:
    """One group: for each ratio, the number of channels removed and the remaining accuracy (0 to 1).

    Examples:
        >>> import prunekit as pk
        >>> pk.GroupSensitivity("conv1", 16, (0.25, 0.5), (4, 8), (0.91, 0.62)).to_json()["accuracy"]
        [0.91, 0.62]
    """

    group: str
    channels: int
    ratios: tuple[float, ...]
    removed: tuple[int, ...]
    accuracy: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


def sensitivity(
    model: nn.Module,
    graph: Graph,
    images: ImageSet,
    ratios: Sequence[float] = RATIOS,
    *,
    batch_size: int = 256,
    on_group: Progress | None = None,
) -> list[GroupSensitivity]:
    """Measure `model` once for every group that can lose channels and every ratio.

    Args:
        model: A classifier.
        graph: The graph that `trace` read from it.
        images: Labelled images to measure on.
        ratios: Shares of a group to remove, between 0 and 1.
        batch_size: Images per forward pass.
        on_group: Called after each group with the groups done and the groups in all.

    Returns:
        For each group, for each ratio, how many channels went, and the accuracy that was left.

    Raises:
        InputError: A ratio is out of range, or nothing can be pruned.

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
    found, count = [], on_group or counter("pruning one group at a time")
    for number, group in enumerate(groups, start=1):
        left = [_pruned_accuracy(model, graph, group, ratio, images, batch_size) for ratio in ratios]
        removed, accuracies = zip(*left, strict=True)
        found.append(GroupSensitivity(group.name, group.size, tuple(ratios), removed, accuracies))
        count(number, len(groups))
    return found


def _pruned_accuracy(
    model: nn.Module, graph: Graph, group: ChannelGroup, ratio: float, images: ImageSet, batch_size: int
) -> tuple[int, float]:
    """Return the number of channels removed from the group, and the accuracy without them."""
    removal = removal_order([group], {group.name: filter_norms(model, group)}, 1)
    count = min(int(ratio * group.size), len(removal.order))
    keeps = keep_after([group], removal, count)
    small = surgery.edit(model, Plan(Keep(name, index) for name, index in keeps.items()), graph)
    with report_progress(None):  # groups are counted
        return count, accuracy(small.eval(), images, batch_size=batch_size).accuracy
