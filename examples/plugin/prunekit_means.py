"""Means are kept: the least that images can do for a pruned network.

The whole of a way of restoring. Every method can then be told to take it (`--restore means`), and prunekit proves what
comes of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from prunekit import Restoration

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunekit import Evidence, Graph, Plan


class Means(Restoration):
    """Fold what removed channels are worth on average, over images, into the next layer."""

    name: ClassVar[str] = "means"
    summary: ClassVar[str] = "Fold what removed channels are worth on average, over images, into the next layer."
    needs_images: ClassVar[bool] = True

    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Add a fold for every layer that reads removed channels: no multiple of others, and their means."""
        import numpy as np  # here, so that `prunekit --help` stays quick
        import torch

        from prunekit import Fold, Plan

        groups = [(graph.group(keep.group), keep.index) for keep in plan.keeps]
        means = input_means(
            model, [reader.module for group, _ in groups for reader in group.consumers], evidence.images
        )
        folds = []
        for group, kept in groups:
            for reader in group.consumers:
                gone = torch.from_numpy(reader.positions[~np.isin(reader.units, kept)])
                offset = torch.zeros_like(means[reader.module])
                offset[gone] = means[reader.module][gone]
                folds.append(Fold(graph.address(reader.parameter), group.name, offset=offset))
        return Plan([*plan, *folds], plan.notes)


def input_means(model: nn.Module, layers: list[str], images: Tensor | None) -> dict[str, Tensor]:
    """Return the mean of each input channel of these layers over the images, `(C,)`, by the layers' names."""
    import torch

    means: dict[str, Tensor] = {}
    hooks = []
    for name in layers:
        module = model.get_submodule(name)
        channels = -1 if isinstance(module, torch.nn.Linear) else 1

        def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name, channels: int = channels) -> None:
            means[name] = inputs[0].movedim(channels, -1).flatten(0, -2).mean(0)

        hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return means
