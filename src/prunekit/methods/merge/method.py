"""Neuron Merging (Kim et al., NeurIPS 2020) and stronger relatives: prune filters, and make up for what they did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.methods.base import Config, Method
from prunekit.methods.merge.config import MergeConfig

if TYPE_CHECKING:
    from torch import nn

    from prunekit.plan import Plan
    from prunekit.restoration.images import Images
    from prunekit.surgery import Graph


class Merge(Method):
    """Method that prunes the same share of every layer that can be compensated, and merges what goes into the rest."""

    name: ClassVar[str] = "merge"
    summary: ClassVar[str] = "Neuron Merging: prune filters and compensate for them in the next layer; needs no data."
    examples: ClassVar[tuple[str, ...]] = (
        "prunekit merge model.pt --ratio 0.5",
        "prunekit merge model.pt --ratio 0.5 --restore synthetic",
        "prunekit merge model.pt --ratio 0.5 --data path/to/images",
        "prunekit merge model.pt --ratio 0.5 --data path/to/images --heal --heal-time 10m",
        "prunekit merge model.pt --ratio 0.3 --skip 'layer1.*' --ratio-of 'layer3.*=0.5'",
        "prunekit merge model.pt --max-drop 1% --data path/to/images",
        "prunekit merge model.pt --target-latency 60% --latency-on onnx --latency-threads 1",
    )
    Config: ClassVar[type[Config]] = MergeConfig

    def plan(self, model: nn.Module, graph: Graph, config: Any, images: Images | None = None) -> Plan:
        """Keep `int(c (1 - ratio))` filters of each mergeable layer, and fold the others into the next layers.

        Selection and compensation both come from the original weights, before any merging.

        Raises:
            InputError: no layer whose consumers could make up for it, a budget that cannot be met, or images that do
                not fit.
        """
        from prunekit.methods.merge.planning import plan_merging

        return plan_merging(model, graph, config, images)
