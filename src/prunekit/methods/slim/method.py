"""Network Slimming (Liu et al., ICCV 2017): remove channels with a small batch-norm gamma, by one global threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.methods.base import Config, Method
from prunekit.methods.slim.config import SlimConfig

if TYPE_CHECKING:
    from torch import nn

    from prunekit.plan import Plan
    from prunekit.restoration.images import Images
    from prunekit.surgery import Graph


class Slim(Method):
    """One-shot Network Slimming: rank by |gamma|, remove the lowest, absorb the constants they leave."""

    name: ClassVar[str] = "slim"
    summary: ClassVar[str] = "Network Slimming: remove channels with small batch-norm gamma, by one global threshold."
    examples: ClassVar[tuple[str, ...]] = (
        "prunekit slim model.pt --ratio 0.5",
        "prunekit slim model.pt --target-macs 50% --round-to 8 -o small.pt",
        "prunekit slim model.pt --ratio 0.5 --only 'layer3.*' --only 'layer4.*'",
        "prunekit slim model.pt --ratio 0.7 --data path/to/images --epochs 20 --iterations 3",
    )
    Config: ClassVar[type[Config]] = SlimConfig

    def plan(self, model: nn.Module, graph: Graph, config: Any, images: Images | None = None) -> Plan:
        """Remove the units with the smallest aggregated |gamma| until the budget is met (section 3 of the paper).

        Raises:
            InputError: There is no batch norm, nothing prunable, the budget cannot be met, or the images do not fit.
        """
        from prunekit.methods.slim.planning import plan_slimming

        return plan_slimming(model, graph, config, images)
