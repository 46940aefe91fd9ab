"""Curves of what each layer loses with its width, measured at a few widths by refitting and running the network."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunekit.errors import SurgeryError
from prunekit.methods.merge.ranked import Ranked
from prunekit.progress import counter
from prunekit.restoration.images import Inputs, tensors_of
from prunekit.restoration.narrowed_alone import IMAGES, NarrowedAlone
from prunekit.surgery import Graph
from prunekit.surgery.graph.blocks import ResidualBlock, residual_blocks

_SHARES = (1 / 2, 1 / 4, 0.0)  # of a layer's units; at least one stays
_LEAST, _TINY = 1e-12, 1e-9

Losses = dict[tuple[str, tuple[int, ...]], dict[int, float]]
"""The losses by width, for a group and the order of its units."""


def measured(
    model: nn.Module, graph: Graph, ranked: Sequence[Ranked], images: Tensor | Inputs, *, depth: bool = False
) -> list[Ranked]:
    """Return the layers with what the network's outputs lose with the first `n` units of each.

    With `depth` also without any, where that lets a residual block go.

    It is measured at a few widths, and between them follows what is foreseen, or where nothing is, the units that are
    gone. What was measured is kept with the graph, so that other budgets cost nothing more.
    """
    alone: NarrowedAlone | None = None
    known, blocks = _known(graph, images), _blocks(graph) if depth else {}
    found, count = list[Ranked](), counter("measuring losses")
    for done, one in enumerate(ranked):
        count(done, len(ranked))
        size = len(one.order)
        key = one.name, tuple(map(int, one.order))
        block = blocks.get(one.name)
        if key not in known:
            alone = alone or NarrowedAlone(model, graph, images)
            widths = sorted({max(1, round(share * size)) for share in _SHARES} - {size})
            known[key] = {n: alone.loss(alone.network(one.layer.group, one.best(n))) for n in widths}
        if block is not None and 0 not in known[key]:
            alone = alone or NarrowedAlone(model, graph, images)
            with contextlib.suppress(SurgeryError):  # what is left of the branch is no constant after all
                known[key] |= {0: alone.loss(alone.without(block))}
        foreseen = 1 - np.arange(size + 1) / size if one.curve is None else one.curve
        curve = through(foreseen, known[key])
        found.append(replace(one, curve=curve, source="measured", can_go=0 in known[key]))
    return found


def _blocks(graph: Graph) -> dict[str, ResidualBlock]:
    """Return the residual blocks that may go, by the group that is narrowed to nothing."""
    whole = [b for b in residual_blocks(graph) if not any(graph.group(name).frozen for name in b.groups)]
    return {block.cuts[-1]: block for block in whole}


def through(foreseen: NDArray[np.float64], measured: Mapping[int, float]) -> NDArray[np.float64]:
    """Return a falling curve through the `measured` losses by width, shaped as a `foreseen` one, both `(units + 1,)`.

    Between two widths the loss is a power of the foreseen loss, past them in proportion to it.
    """
    at = np.log(np.maximum(foreseen, _LEAST)) - _TINY * np.arange(len(foreseen))  # which falls at each step
    widths = sorted(measured, reverse=True)
    x = at[widths]
    y = np.maximum.accumulate(np.log(np.maximum([measured[width] for width in widths], _LEAST)))
    beyond = np.minimum(at - x[0], 0.0) + np.maximum(at - x[-1], 0.0)
    curve = np.exp(np.interp(at, x, y) + beyond)
    curve[-1] = 0.0
    falling: NDArray[np.float64] = np.minimum.accumulate(curve)
    return falling


def _known(graph: Graph, images: Tensor | Inputs) -> Losses:
    """Return what has been measured of a graph's network on these images."""
    chosen, losses = tensors_of(images[:IMAGES]), Losses()
    last: tuple[tuple[Tensor, ...], Losses] | None = graph.memo.get(measured)
    if last is not None and all(map(torch.equal, last[0], chosen)):
        return last[1]
    graph.memo[measured] = tuple(part.clone() for part in chosen), losses
    return losses
