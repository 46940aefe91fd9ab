"""Network Slimming (Liu et al., ICCV 2017): channels whose batch-norm gamma is small go, by one global threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.methods.base import Config, Method, option

if TYPE_CHECKING:
    from torch import nn

    from prunekit.plan import Plan
    from prunekit.restore.images import Images
    from prunekit.surgery import Graph


@dataclass(frozen=True)
class SlimConfig(Config):
    """Settings of Network Slimming."""

    scope: str = option(
        "all", help="'inner' leaves channels alone that several layers share by addition.", choices=("all", "inner")
    )
    aggregate: str = option(
        "max", help="How the gammas of coupled channels become one score.", choices=("max", "mean", "sum")
    )
    restore: str | None = option(
        None,
        help="'calibrate' refits what stays to unlabelled images (the default when there are any), 'synthetic' to "
        "images made from the network itself; 'constants' folds what a removed channel is worth on average, act(beta), "
        "into the next layer (the default without images); 'none' drops it as the paper's release does.",
        choices=("calibrate", "synthetic", "constants", "none"),
    )


class Slim(Method):
    """One-shot Network Slimming: rank by |gamma|, remove the lowest, absorb the constants they leave."""

    name: ClassVar[str] = "slim"
    summary: ClassVar[str] = "Network Slimming: remove channels with small batch-norm gamma, by one global threshold."
    examples: ClassVar[tuple[str, ...]] = (
        "prunekit slim model.pt --ratio 0.5",
        "prunekit slim model.pt --target-macs 50% --round-to 8 -o small.pt",
        "prunekit slim model.pt --ratio 0.7 --data path/to/images --epochs 20 --iterations 3",
    )
    Config: ClassVar[type[Config]] = SlimConfig

    def plan(self, model: nn.Module, graph: Graph, config: Any, images: Images | None = None) -> Plan:
        """Remove the units with the smallest aggregated |gamma| until the budget is met (section 3 of the paper).

        Raises:
            InputError: no batch norm, nothing prunable, a budget that cannot be met, or images that do not fit.
        """
        from prunekit.methods.slim.planning import plan_slimming

        return plan_slimming(model, graph, config, images)
