"""Layers with their units in an order, from the best to the worst by some criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunekit.methods.merge.candidates import Candidate
from prunekit.methods.merge.selection import losses, pivoted
from prunekit.progress import counter
from prunekit.restoration.second_moments import Reading


@dataclass(frozen=True)
class Ranked:
    """A layer, its units from the best to the worst, and what is lost with the first `n` of them, if that is known.

    The `source` of that are readings of the layer, modelled ones, or what the network's outputs were seen to lose.
    Where the layer `can_go`, it is known what is lost without any unit: the residual block around it goes as a whole.
    """

    layer: Candidate
    criterion: str
    order: NDArray[np.int64]
    curve: NDArray[np.float64] | None = None
    source: Literal["read", "modelled", "measured"] = "read"
    can_go: bool = False

    @property
    def name(self) -> str:
        """The group's name."""
        return self.layer.group.name

    def best(self, number: int) -> list[int]:
        """Return the best units, ascending."""
        return sorted(int(unit) for unit in self.order[:number])


def rank(
    layers: Sequence[Candidate], criterion: str | None, usual: str, readings: Mapping[str, Reading]
) -> list[Ranked]:
    """Return each layer's units by the criterion; by `l2-norm` where `pivot` has no reading of them.

    Where `criterion` is None it is the `usual` one, and `pivot` for layers that read what a norm hands on.
    """
    ranked, count = list[Ranked](), counter("ranking filters")
    for done, layer in enumerate(layers):
        count(done, len(layers))
        reading = readings.get(layer.group.name)
        own = criterion or ("pivot" if reading is not None and reading.in_front else usual)
        if own == "pivot" and reading is not None:
            ranked.append(Ranked(layer, own, *pivoted(reading)))
        else:
            own = "l2-norm" if own == "pivot" else own
            ranked.append(Ranked(layer, own, np.argsort(-importance(layer.weight, own), kind="stable")))
    return ranked


def with_losses(ranked: Sequence[Ranked], readings: Mapping[str, Reading]) -> list[Ranked]:
    """Return the layers with the losses that their readings foresee, for those that have any."""
    found = []
    for one in ranked:
        reading = readings.get(one.name)
        if reading is not None:
            curve = losses(reading, one.order) if one.curve is None else one.curve
            one = replace(one, curve=curve, source="modelled" if reading.modelled else "read")
        found.append(one)
    return found


def importance(weight: Tensor, criterion: str) -> NDArray[np.float64]:
    """Return a score for each filter, `(C,)`: `l1-norm`, `l2-norm`, or `l2-GM`, the sum of distances to all filters."""
    flat = weight.flatten(1).double().cpu()
    if criterion == "l2-GM":
        scores = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
    else:
        scores = flat.norm(p=1 if criterion == "l1-norm" else 2, dim=1)
    result: NDArray[np.float64] = scores.numpy()
    return result
