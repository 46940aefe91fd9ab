"""Copies of a network that share its weights: what a proof runs need not take memory for what it only reads."""

from __future__ import annotations

from torch import nn


def aliases(model: nn.Module) -> dict[int, nn.Parameter]:
    """For `copy.deepcopy(model, memo)`: each parameter stands for a new one on the same storage.

    Such a copy may be run, moved, and converted to another type, which gives it memory of its own; its weights must not
    be written in place. Buffers, which a forward may write, are copied.
    """
    return {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad and not p.is_inference())
        for p in model.parameters()
    }
