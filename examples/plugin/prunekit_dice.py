"""Dice decide: each channel is worth the eyes of its throws, and the lowest go.

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
class DiceConfig(Config):
    """Settings of the method."""

    throws: int = option(3, help="Throws for each channel.")
    seed: int = option(0, help="Seed of the dice: the same seed gives the same channels.")
    restore: str = option("none", help="How to make up for what goes.", choices=restorations)


class Dice(Method):
    """Remove the channels with the fewest eyes."""

    name: ClassVar[str] = "dice"
    summary: ClassVar[str] = "Remove the channels with the fewest eyes: an example of a method in a package."
    examples: ClassVar[tuple[str, ...]] = ("prunekit dice model.pt --ratio 0.3 --seed 1",)
    Config: ClassVar[type[Config]] = DiceConfig

    def plan(self, model: nn.Module, graph: Graph, config: Any, images: Images | None = None) -> Plan:
        """Throw for each channel; the lowest sums go, and are made up for as was asked.

        Raises:
            InputError: nothing can be removed, or the budget cannot be met.
        """
        import numpy as np  # here, so that `prunekit --help` stays quick

        from prunekit import plan_by_scores, restore

        draw = np.random.default_rng(config.seed)
        eyes = {group.name: draw.integers(1, 7, (group.size, config.throws)) for group in graph.groups if group.free}
        scores = {name: thrown.sum(1).astype(float) for name, thrown in eyes.items()}
        plan = plan_by_scores(graph, scores, config)
        return restore(model, plan, graph=graph, images=images, way=config.restore)
