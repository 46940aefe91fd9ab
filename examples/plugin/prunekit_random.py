"""Random channels go: the baseline that every pruning criterion has to beat.

The whole of a method: its settings, and a plan that says which channels stay. prunekit makes the command, the help and
the JSON of it, cuts the network, and proves the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.errors import InputError
from prunekit.methods.base import Config, Method, option

if TYPE_CHECKING:
    from torch import nn

    from prunekit.plan import Plan
    from prunekit.restore.images import Images
    from prunekit.surgery import Graph


@dataclass(frozen=True)
class RandomConfig(Config):
    """Settings of the baseline."""

    seed: int = option(0, help="Seed of the draw: the same seed gives the same channels.")


class RandomChannels(Method):
    """Remove channels at random, all with the same chance."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "Remove random channels: the baseline that every criterion has to beat."
    examples: ClassVar[tuple[str, ...]] = ("prunekit random model.pt --ratio 0.3 --seed 1",)
    Config: ClassVar[type[Config]] = RandomConfig

    def plan(self, model: nn.Module, graph: Graph, config: Any, images: Images | None = None) -> Plan:
        """Keep a random share of the channels that may go, and at least `min_channels` of every layer.

        Raises:
            InputError: nothing can be removed, or another budget than a ratio was given.
        """
        import numpy as np  # here, so that `prunekit --help` stays quick

        from prunekit.methods.budget import check_ratio
        from prunekit.methods.ranking import keep_after, removal_order, round_widths
        from prunekit.plan import Keep, Plan

        del model, images  # chance looks at neither
        if config.ratio is None:
            raise InputError("this method takes --ratio alone", hint="for example --ratio 0.3")
        groups = [group for group in graph.groups if group.free]
        if not groups:
            raise InputError("no channels of this model can be removed", hint="prunekit inspect says why")
        draw = np.random.default_rng(config.seed)
        scores = {group.name: draw.random(group.size) for group in groups}
        removal = removal_order(groups, scores, config.min_channels)
        count = min(round(check_ratio(config.ratio) * sum(len(group.free) for group in groups)), len(removal.order))
        keeps = round_widths(groups, scores, keep_after(groups, removal, count), config.round_to)
        return Plan((Keep(name, index) for name, index in keeps.items()), {"protected": list(removal.protected)})
