"""The baselines as methods."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.methods.base import Config, Method
from prunekit.methods.baselines.config import BaselineConfig, RandomConfig

if TYPE_CHECKING:
    from torch import nn

    from prunekit.methods.ranking import Scores
    from prunekit.plan import Plan
    from prunekit.restoration.images import Images, LabelledImages
    from prunekit.surgery import Graph


class _Baseline(Method):
    """A method that is a score for each channel."""

    Config: ClassVar[type[Config]] = BaselineConfig
    baseline: ClassVar[bool] = True

    def plan(self, model: nn.Module, graph: Graph, config: Any, images: Images | LabelledImages | None = None) -> Plan:
        """Remove the channels with the lowest scores.

        Raises:
            InputError: Nothing can be removed, the budget cannot be met, or images are needed and there are none.
        """
        from prunekit.methods.scoring import plan_by_scores
        from prunekit.restoration import registry
        from prunekit.restoration.guarded import restored
        from prunekit.restoration.images import without_labels

        way = registry.chosen(config.restore, "none", images=images is not None, config=config)
        plan = plan_by_scores(graph, self.scores(model, graph, config, images), config)
        plain = None if images is None else without_labels(images)
        return restored(model, graph, plan, way, way.evidence(model, graph, plain))

    @abstractmethod
    def scores(self, model: nn.Module, graph: Graph, config: Any, images: Images | LabelledImages | None) -> Scores:
        """Return an array `(group size,)` for each channel group by name; the lowest scores go first."""


class RandomChannels(_Baseline):
    """Remove channels at random, all with the same chance."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "Baseline: remove random channels, all with the same chance."
    examples: ClassVar[tuple[str, ...]] = ("prunekit random model.pt --ratio 0.3 --seed 1",)
    Config: ClassVar[type[Config]] = RandomConfig

    def scores(self, model: nn.Module, graph: Graph, config: Any, images: Images | LabelledImages | None) -> Scores:
        """Draw a score for each channel."""
        import numpy as np

        del model, images  # chance looks at neither
        draw = np.random.default_rng(config.seed)
        return {group.name: draw.random(group.size) for group in graph.groups}


class L1Norm(_Baseline):
    """Remove the filters with the smallest L1 norm, the same share of every layer.

    Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.1.
    """

    name: ClassVar[str] = "l1-norm"
    summary: ClassVar[str] = "Baseline: remove the smallest filters of each layer (Li et al., ICLR 2017)."
    examples: ClassVar[tuple[str, ...]] = ("prunekit l1-norm model.pt --ratio 0.3",)

    def scores(self, model: nn.Module, graph: Graph, config: Any, images: Images | LabelledImages | None) -> Scores:
        """Rank the filters of each group by their norms."""
        from prunekit.methods.baselines.scores import norm_ranks

        del config, images
        return norm_ranks(model, graph)


class Taylor(_Baseline):
    """Remove the channels whose loss, to first order, changes least when they go; it takes labelled images.

    Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019).
    """

    name: ClassVar[str] = "taylor"
    summary: ClassVar[str] = (
        "Baseline: remove what changes the loss least, to first order (Molchanov et al., CVPR 2019)."
    )
    examples: ClassVar[tuple[str, ...]] = (
        "prunekit taylor model.pt --data digits --ratio 0.3",
        "prunekit taylor model.pt --data path/to/images --target-macs 50% --epochs 5 -o small.pt",
    )
    labelled: ClassVar[bool] = True

    def scores(self, model: nn.Module, graph: Graph, config: Any, images: Images | LabelledImages | None) -> Scores:
        """Sum up the gradient times the weights of each channel, and square."""
        from prunekit.methods.baselines.scores import taylor_scores

        del config
        return taylor_scores(model, graph, images)
