"""Behaviour of a gated network on a data set, as one result object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.methods.manidp.costs import DynamicCost
from prunekit.methods.manidp.rank_correlation import spearman
from prunekit.methods.manidp.record import Record

_SHARES = {"p5": 0.05, "median": 0.5, "p95": 0.95}


@dataclass(frozen=True)
class LayerUse:
    """One gated layer: its channels, the share that images keep, and how many are on for all images and for none."""

    layer: str
    channels: int
    kept: float
    always: int
    never: int


@dataclass(frozen=True)
class GateResult:
    """MACs over images: `mean`, `median`, `p5`, `p95`, without the gates and (`with_gates`) including them; `dense` are
    those with every channel on. `spearman` correlates an image's MACs with its cross-entropy: above zero, simple images
    are cheap.
    """

    dense: int
    gates: int
    macs: dict[str, float]
    kept: float
    spearman: float | None
    layers: tuple[LayerUse, ...]

    @property
    def with_gates(self) -> dict[str, float]:
        """The MACs with those of the gates."""
        return {name: value + self.gates for name, value in self.macs.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "dense_macs": self.dense,
            "gate_macs": self.gates,
            "macs": self.macs,
            "macs_with_gates": self.with_gates,
            "kept": self.kept,
            "spearman": self.spearman,
            "layers": [dict(vars(layer)) for layer in self.layers],
        }


def assess(record: Record, cost: DynamicCost) -> GateResult:
    """Sum a record up."""
    images = len(record.kept)
    shares = record.kept.double() / torch.tensor(cost.channels, dtype=torch.float64)
    layers = tuple(
        LayerUse(name, width, float(share), int((used == images).sum()), int((used == 0).sum()))
        for name, width, share, used in zip(cost.layers, cost.channels, shares.mean(0), record.used, strict=True)
    )
    return GateResult(
        dense=cost.dense,
        gates=cost.gates,
        macs={"mean": record.mean_macs, **_quantiles(record.macs)},
        kept=float(shares.mean()),
        spearman=spearman(record.macs, record.losses) if len(record.losses) else None,
        layers=layers,
    )


def _quantiles(macs: Tensor) -> dict[str, float]:
    """Return the smallest value that a share of the images does not exceed."""
    ordered = macs.sort().values
    return {name: float(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) for name, share in _SHARES.items()}
