"""Neuron Merging (Kim et al., NeurIPS 2020): prune filters, and let the next layer make up for each, without data."""

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
class MergeConfig(Config):
    """Settings of Neuron Merging; the defaults are the paper's for ResNet-56 and VGG-16 on CIFAR-10."""

    criterion: str = option(
        "l1-norm",
        help="Which filters stay: the largest norms, or the largest sums of distances to all others.",
        choices=("l1-norm", "l2-norm", "l2-GM"),
    )
    restore: str | None = option(
        None,
        help="'paper' merges each removed filter into a kept one, without data (the default); 'calibrate' refits what "
        "stays to unlabelled images (the default when there are any); 'none' only prunes.",
        choices=("calibrate", "paper", "none"),
    )
    threshold: float = option(0.1, help="Least cosine similarity of two filters that are merged (the paper's t).")
    lam: float = option(
        0.85, help="Weight of the cosine against the batch-norm bias distance (lambda).", flag="--lambda"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("threshold", -1.0), ("lam", 0.0)):
            if not low <= getattr(self, name) <= 1:
                flag = "lambda" if name == "lam" else name
                raise InputError(f"--{flag} must lie between {low:g} and 1, not {getattr(self, name)}")


class Merge(Method):
    """Prune the same share of every layer that can be compensated, and merge what goes into what stays."""

    name: ClassVar[str] = "merge"
    summary: ClassVar[str] = "Neuron Merging: prune filters and compensate for them in the next layer; needs no data."
    examples: ClassVar[tuple[str, ...]] = (
        "prunekit merge model.pt --ratio 0.5",
        "prunekit merge model.pt --ratio 0.3 --criterion l2-norm --restore none",
    )
    Config: ClassVar[type[Config]] = MergeConfig

    def plan(self, model: nn.Module, graph: Graph, config: Any, images: Images | None = None) -> Plan:
        """Keep `int(c (1 - ratio))` filters of each mergeable layer, and fold the others into the next layers.

        Selection and compensation both come from the original weights, before any merging.

        Raises:
            InputError: no layer whose consumers could make up for it, a budget that cannot be met, or images that do
                not fit.
        """
        from prunekit.methods.merging import plan_merging

        return plan_merging(model, graph, config, images)
