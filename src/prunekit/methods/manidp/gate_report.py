"""A gated network's behaviour on a data set, gathered for a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.data import ImageSet, labelled_for
from prunekit.devices import device_of
from prunekit.evaluation.score import scored
from prunekit.methods.manidp.assess import GateResult, assess
from prunekit.methods.manidp.budgets import used_budget
from prunekit.methods.manidp.gating import baseline_of
from prunekit.methods.manidp.objective import gram, pooled
from prunekit.methods.manidp.record import Record, observe, watched
from prunekit.methods.manidp.thresholds import SPAN, Thresholds
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import GatedConv, same_thresholds
from prunekit.progress import counter, report_progress
from prunekit.surgery.execution.hooks import hooked

_SHIFTS = (-SPAN, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
_SWEPT = 2000  # images at each point of the sweep
_ALIGNED = 256  # images whose manifolds are compared


@dataclass(frozen=True)
class Portrait:
    """`result` and `record` at the present thresholds; `sweep` has (mean MACs, accuracy) as all thresholds grow
    together; `alignment` has for each layer the correlation of the cosines between images' features and of those
    between their saliencies; `classes` the mean MACs and accuracy by class name; `budget`
    the name of the thresholds, where they are stored ones, and `baseline` the validation accuracy before the gates,
    where it is known.
    """

    result: GateResult
    record: Record
    sweep: tuple[tuple[float, float], ...]
    alignment: dict[str, float]
    classes: dict[str, tuple[float, float]]
    budget: str | None = None
    baseline: float | None = None

    def cheapest(self, count: int) -> list[int]:
        """Return the images of the lowest MACs, cheapest first."""
        order: list[int] = self.record.macs.argsort(stable=True)[:count].tolist()
        return order

    def dearest(self, count: int) -> list[int]:
        """Return the images of the highest MACs, dearest first."""
        order: list[int] = self.record.macs.argsort(descending=True, stable=True)[:count].tolist()
        return order


def portray(view: GatedView, images: ImageSet) -> Portrait:
    """Watch a network, in eval mode, on labelled `images`. Thresholds are moved for the sweep and put back.

    Raises:
        InputError: The images are of other classes than the network.
    """
    images = labelled_for(view.model, images)
    scored(view.model, images.subset([0]))  # which compares the number of classes with that of the outputs
    record = observe(view, images.batches(250))
    return Portrait(
        result=assess(record, view.cost),
        record=record,
        sweep=_sweep(view, images.sample(min(_SWEPT, len(images)))),
        alignment=_alignment(view, images.sample(min(_ALIGNED, len(images)))),
        classes=_by_class(record, images),
        budget=used_budget(view.model),
        baseline=baseline_of(view.model),
    )


def _sweep(view: GatedView, images: ImageSet) -> tuple[tuple[float, float], ...]:
    layers = view.layers.values()
    family = Thresholds.around(view, observe(view, images.batches(250), saliencies=True))
    points, count = [], counter("trying thresholds")
    with same_thresholds(layers):
        for done, shift in enumerate(_SHIFTS):
            count(done, len(_SHIFTS))
            for layer, value in zip(layers, family.at(shift), strict=True):
                layer.threshold.fill_(value)
            with report_progress(None):
                found = observe(view, images.batches(250))
            points.append((found.mean_macs, found.accuracy))
    return tuple(points)


@torch.no_grad()
def _alignment(view: GatedView, images: ImageSet) -> dict[str, float]:
    layers = view.layers.values()
    features: list[Tensor] = []
    with (
        hooked(layer.norm.register_forward_hook(_keeping(features, layer)) for layer in layers),
        watched(layers) as seen,
    ):
        view.model(images.inputs().to(device_of(view.model)))
    pairs = zip(view.cost.layers, features, seen, strict=True)
    return {name: _correlation(gram(f.double()), gram(pi.double())) for name, f, pi in pairs}


def _keeping(features: list[Tensor], layer: GatedConv) -> Callable[[nn.Module, object, Tensor], None]:
    def keep(_: nn.Module, __: object, y: Tensor) -> None:
        features.append(pooled(layer, y))

    return keep


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation of two symmetric matrices, off the diagonal; 0 where one is constant."""
    row, column = torch.triu_indices(len(a), len(a), offset=1)
    both = torch.stack([a[row, column], b[row, column]])
    both = both - both.mean(1, keepdim=True)
    norms = both.norm(dim=1)
    return float(both[0] @ both[1] / norms.prod()) if bool((norms > 1e-9).all()) else 0.0


def _by_class(record: Record, images: ImageSet) -> dict[str, tuple[float, float]]:
    found = {}
    for label, name in enumerate(images.classes):
        members = images.labels.cpu() == label
        if bool(members.any()):
            share = float(record.correct[members].double().mean())
            found[name] = (float(record.macs[members].mean()), share)
    return found


def histogram(values: Sequence[float] | Tensor, bins: int = 30) -> list[tuple[float, int]]:
    """Return the middles of equal bins, and the number of values in each."""
    series = torch.as_tensor(values, dtype=torch.float64)
    low, high = float(series.min()), float(series.max())
    if low == high:
        return [(low, len(series))]
    counts = torch.histc(series, bins, low, high).tolist()
    width = (high - low) / bins
    return [(low + (number + 0.5) * width, int(count)) for number, count in enumerate(counts)]
