"""Variants of a gated network to compare: without one of the losses, or with equally many channels for every image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.data import ImageSet
from prunekit.methods.manidp.rank_correlation import spearman
from prunekit.methods.manidp.record import observe
from prunekit.methods.manidp.view import GatedView

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "both": {},
    "complexity": {"no_similarity": True},
    "similarity": {"no_complexity": True},
    "neither": {"no_complexity": True, "no_similarity": True},
}
"""The settings of a recipe that leave losses out, by what remains."""
_BATCH = 250


@dataclass(frozen=True)
class AblationRow:
    """One network on the test images: `accuracy` (0 to 1), mean `macs` without those of gates, and for networks with
    gates the 5th and 95th percentile of the MACs and their rank correlation with the loss. `error` says why there is
    no figure.
    """

    label: str
    accuracy: float | None = None
    macs: float | None = None
    macs_p5_p95: tuple[float, float] | None = None
    spearman: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**vars(self), "macs_p5_p95": None if self.macs_p5_p95 is None else list(self.macs_p5_p95)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AblationRow:
        """Read the JSON that `to_json` wrote; raise `TypeError` or `ValueError` for anything else."""
        span = data["macs_p5_p95"]
        row = cls(**{**data, "macs_p5_p95": None if span is None else tuple(span)})
        for value in (row.accuracy, row.macs, row.spearman, *(row.macs_p5_p95 or (None, None))):
            if not isinstance(value, int | float | None):
                raise TypeError(f"{value!r} is no figure")
        if row.macs_p5_p95 is not None and len(row.macs_p5_p95) != 2:
            raise ValueError(f"{span} is no pair")
        return row


def measured_row(label: str, view: GatedView, images: ImageSet) -> AblationRow:
    """Measure a network with gates, in eval mode and with its present thresholds, on labelled images."""
    record = observe(view, images.batches(_BATCH))
    low, high = torch.quantile(record.macs, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return AblationRow(label, record.accuracy, record.mean_macs, (low, high), spearman(record.macs, record.losses))


@contextlib.contextmanager
def equally_many(view: GatedView, images: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, each layer keeps the channels with the largest saliencies of each image, equally many for all images: as
    many as its gates keep of `images` on average.
    """
    means = observe(view, images).kept.double().mean(dim=0).tolist()
    for layer, mean in zip(view.layers.values(), means, strict=True):
        layer.kept = _largest(max(1, round(mean)))  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in view.layers.values():
            del layer.kept


def _largest(count: int) -> Callable[[Tensor], Tensor]:
    def kept(pi: Tensor) -> Tensor:
        return pi * (pi >= pi.topk(count, dim=1).values[:, -1:]).to(pi.dtype)

    return kept
