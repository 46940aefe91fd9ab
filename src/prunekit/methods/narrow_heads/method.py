"""Narrowing of heads as a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.methods.base import Config, Method
from prunekit.methods.narrow_heads.config import NarrowHeadsConfig

if TYPE_CHECKING:
    from torch import nn

    from prunekit.plan import Plan
    from prunekit.restoration.images import Images
    from prunekit.surgery import Graph


class NarrowHeads(Method):
    """Method that makes queries, keys and values of attention narrower; the heads stay."""

    name: ClassVar[str] = "narrow-heads"
    summary: ClassVar[str] = "Narrow the heads of attention by the low rank of their projections; needs no data."
    examples: ClassVar[tuple[str, ...]] = (
        "prunekit narrow-heads vit.pt --ratio 0.5",
        "prunekit narrow-heads vit.pt --ratio 0.5 --parts qk -o narrow.pt",
    )
    Config: ClassVar[type[Config]] = NarrowHeadsConfig
    inside_heads: ClassVar[bool] = True

    def plan(self, model: nn.Module, graph: Graph, config: Any, images: Images | None = None) -> Plan:
        """Turn the coordinates inside each head so that the first ones matter most, and keep these.

        Raises:
            InputError: No head can become narrower, or a budget that cannot be met.
        """
        from prunekit.methods.narrow_heads.planning import plan_narrowing

        del images  # the weights tell enough
        return plan_narrowing(model, graph, config)
