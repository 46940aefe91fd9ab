"""Refitting in order: at each layer, what the pruned network reads is fitted to what the original gave there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.plan import Plan, Refit
from prunekit.progress import counter
from prunekit.restoration.frontier import Arrival, Frontier
from prunekit.restoration.least_squares import HELD, Wanted, fit_towards
from prunekit.restoration.refit_targets import Site
from prunekit.restoration.samples import LayerCall, inputs_at, outputs_at, positions, rows_of
from prunekit.restoration.streams import scale_of
from prunekit.surgery.editing.editor import refit
from prunekit.surgery.execution.dispatch import unfused_attention

PER_INPUT, LEAST = 80, 16_000  # positions that a layer is fitted at: for each input of it, and in any case
ASIDE = 5  # every so many images, one is put aside to choose the ridge by
ROUNDS = 4  # repetitions of a fit that an activation with a flat part follows; twelve gained nothing more


@dataclass(frozen=True)
class Restored:
    """The refits, in order; what failed and why; and how many positions each layer was fitted to."""

    refits: list[Refit]
    failed: dict[str, str]
    rows: dict[str, int]


def refit_in_order(
    frontier: Frontier,
    small: nn.Module,
    sites: Sequence[Site],
    *,
    rows: int,
    ridge: float | None,
    seed: int,
) -> Restored:
    """Refit each layer of `small` **in place**, just before it runs, at `rows` positions of its output at most."""
    refits: list[Refit] = []
    failed: dict[str, str] = {}
    counts: dict[str, int] = {}
    numbers, count = {site.layer: number for number, site in enumerate(sites)}, counter("refitting layers")
    with frontier, torch.no_grad(), unfused_attention():
        for done, (site, arrivals) in enumerate(frontier.arrivals()):
            count(done, len(sites))
            generator = torch.Generator().manual_seed(seed + numbers[site.layer])
            sample = _sampled(small, site, arrivals, frontier.images, rows, generator)
            if sample is None:
                continue
            counts[site.layer] = sample.rows
            try:
                found = _fitted(small, site, sample, ridge)
            except FloatingPointError as error:
                failed[site.layer] = str(error)
                continue
            refit(small, Plan(found))
            refits += found
            del sample
    count(len(sites), len(sites))
    return Restored(refits, failed, counts)


def _needed(call: LayerCall, rows: int) -> int:
    """Return at how many positions to look at a layer, `rows` at most: the more inputs an output has, the more."""
    inputs = call.weight[0].numel()
    holdable = HELD // (inputs * call.groups * call.x.element_size())  # grouped layers have many systems, all small
    return min(rows, max(LEAST, PER_INPUT * inputs), max(2000, holdable))


def _sampled(
    small: nn.Module,
    site: Site,
    arrivals: Iterable[Arrival | None],
    images: int,
    rows: int,
    generator: torch.Generator,
) -> _Sample | None:
    """Return a layer at `rows` positions at most, over all images; None where some images pass it by."""
    sample: _Sample | None = None
    for arrival in arrivals:
        if arrival is None:
            return None
        if sample is None:
            sample = _Sample(small, site, arrival, images, rows, generator)
        if not sample.add(arrival):
            return None
    return sample


class _Sample:
    """A layer at random positions: `x`, `(groups, inputs, rows)`, is what the pruned network reads there and `wanted`,
    `(groups, outputs, rows)`, what it is to give. `aside` are the rows, `(rows,)`, of the images by which the ridge is
    chosen.
    """

    def __init__(
        self, small: nn.Module, site: Site, first: Arrival, images: int, rows: int, generator: torch.Generator
    ) -> None:
        self.call = call = first.small.call
        output = _output(first)
        self._each = rows_of(output) // first.images  # positions of an image
        self._where = positions(self._each * images, _needed(call, rows), generator)
        self.rows = len(self._where)
        self.aside = self._where // self._each % ASIDE == ASIDE - 1
        wide = torch.promote_types(call.weight.dtype, torch.float32)
        self.x = call.x.new_empty(call.groups, call.weight[0].numel(), self.rows, dtype=wide)
        self.wanted = call.x.new_empty(call.groups, len(call.weight) // call.groups, self.rows, dtype=wide)
        self.repairs = site.join is not None and _joins(first)
        self._kept = None if site.kept is None else site.kept.to(output.device)
        self._share = 1 / scale_of(small, site.join.norm) if site.join is not None else torch.ones(1)
        self._seen = self._filled = 0

    def add(self, arrival: Arrival) -> bool:
        """Add a batch, and return whether it is like the first one."""
        output = _output(arrival)
        if rows_of(output) != self._each * arrival.images or (self.repairs and not _joins(arrival)):
            return False
        own = self._where[self._filled :] - self._seen * self._each
        own = own[: int(torch.searchsorted(own, rows_of(output)))]
        wanted = self._cut(outputs_at(output, own))
        if self.repairs:  # what brings the residual stream back to the original's
            was, now = (_as_output(stop.stream, output) for stop in (arrival.original, arrival.small))
            wanted = wanted + self._share * (self._cut(outputs_at(was, own)) - outputs_at(now, own))
        place = slice(self._filled, self._filled + len(own))
        self.wanted[..., place] = wanted.t().reshape(*self.wanted.shape[:2], -1)
        for part, x in inputs_at(arrival.small.call, own):
            self.x[..., self._filled + part.start : self._filled + part.start + x.size(2)] = x
        self._filled, self._seen = place.stop, self._seen + arrival.images
        return True

    def _cut(self, values: Tensor) -> Tensor:
        return values if self._kept is None else values[:, self._kept]


def _output(arrival: Arrival) -> Tensor:
    assert arrival.original.output is not None
    return arrival.original.output


def _as_output(stream: Tensor | None, output: Tensor) -> Tensor:
    """Return a stream in the shape of what is added to it: a product of matrices gives rows."""
    assert stream is not None
    return stream.reshape(-1, stream.size(-1)) if output.dim() == 2 else stream


def _joins(arrival: Arrival) -> bool:
    was, now, output = arrival.original.stream, arrival.small.stream, _output(arrival)
    if was is None or now is None:
        return False
    return was.shape == output.shape or (output.dim() == 2 and was.numel() == output.numel())


def _wanted(small: nn.Module, site: Site, sample: _Sample) -> Wanted:
    """Return the output that is wanted of a layer; with bounds where an activation with a flat part alone reads it.

    Such an activation does not tell numbers from one another: a ReLU negative ones, say. Then any output that looks to
    it as the original's does is as good.
    """
    if site.flat is None or sample.repairs:
        return Wanted(sample.wanted, aside=sample.aside)
    scale, offset = (values.expand(sample.wanted.shape[:2].numel()) for values in _affine(small, site.norm))
    scale, offset = (values.reshape(*sample.wanted.shape[:2], 1) for values in (scale, offset))
    return Wanted(sample.wanted, _alike(sample.wanted, site.flat, scale, offset), sample.aside)


def _alike(output: Tensor, flat: tuple[float, float], scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest outputs that make the same of `scale * output + offset`, each
    `(groups, outputs, rows)`; scale and offset are `(groups, outputs, 1)`.

    All numbers up to `flat[0]` are the same there, and all from `flat[1]` on.
    """
    low, high = ((edge - offset) / scale for edge in flat)
    low, high = torch.where(scale > 0, low, high), torch.where(scale > 0, high, low)
    usable = scale.isfinite()
    low, high = torch.where(usable, low, -math.inf).to(output), torch.where(usable, high, math.inf).to(output)
    least = torch.where(output <= low, -math.inf, torch.minimum(output, high))
    return least, torch.where(output >= high, math.inf, torch.maximum(output, low))


def _affine(small: nn.Module, norm: str | None) -> tuple[Tensor, Tensor]:
    """Return scale and offset of a batch norm; one and zero without."""
    scale = scale_of(small, norm)
    if norm is None:
        return scale, torch.zeros_like(scale)
    module: Any = small.get_submodule(norm)
    offset = -module.running_mean * scale
    return scale, offset if module.bias is None else offset + module.bias


def _fitted(small: nn.Module, site: Site, sample: _Sample, ridge: float | None) -> list[Refit]:
    """Return the refits of a layer, and of the batch norm that takes its constant, to give what is wanted of it.

    Raises:
        FloatingPointError: the layer's input, or what is wanted of it, is not finite.
    """
    weight, layer = sample.call.weight, small.get_submodule(site.layer)
    start = weight.reshape(*sample.wanted.shape[:2], -1)
    bias: Any = layer.bias
    constant = bias is not None or site.norm is not None
    fit = fit_towards(start, sample.x, _wanted(small, site, sample), ridge, constant=constant, rounds=ROUNDS)
    values, shift = {"weight": fit.weight.reshape(weight.shape).to(weight)}, fit.constant.flatten()
    if bias is not None:
        shift = shift + bias if site.added_behind else shift
        return [Refit(site.layer, {**values, "bias": shift.to(bias)})]
    if site.norm is None:
        return [Refit(site.layer, values)]
    mean = small.get_buffer(f"{site.norm}.running_mean")
    return [Refit(site.layer, values), Refit(site.norm, {"running_mean": (mean - shift).to(mean)})]
