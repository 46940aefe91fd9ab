"""Random channels go: the baseline that every pruning criterion has to beat.

The whole of a method: its settings, and a plan that says which channels stay. prunekit makes the command, the help and
the JSON of it, cuts the network, and proves the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prunekit import Config, Method, option, restorations

if TYPE_CHECKING:
    from torch import nn

    from prunekit import Graph, Images, Plan


@dataclass(frozen=True)
class RandomConfig(Config):
    """Settings of the baseline."""

    seed: int = option(0, help="Seed of the draw: the same seed gives the same channels.")
    restore: str = option("none", help="How to make up for what goes.", choices=restorations)


class RandomChannels(Method):
    """Remove channels at random, all with the same chance."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "Remove random channels: the baseline that every criterion has to beat."
    examples: ClassVar[tuple[str, ...]] = ("prunekit random model.pt --ratio 0.3 --seed 1",)
    Config: ClassVar[type[Config]] = RandomConfig

    def plan(self, model: nn.Module, graph: Graph, config: Any, images: Images | None = None) -> Plan:
        """Give each channel a random score; the lowest go, and are made up for as was asked.

        Raises:
            InputError: nothing can be removed, or the budget cannot be met.
        """
        import numpy as np  # here, so that `prunekit --help` stays quick

        from prunekit import plan_by_scores, restore

        draw = np.random.default_rng(config.seed)
        scores = {group.name: draw.random(group.size) for group in graph.groups if group.free}
        plan = plan_by_scores(graph, scores, config)
        return restore(model, plan, graph=graph, images=images, way=config.restore)
