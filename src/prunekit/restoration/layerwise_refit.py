"""Refitting in order: at each layer, what the pruned network reads is fitted to what the original gave there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.plan import Plan, Refit
from prunekit.progress import counter
from prunekit.restoration.frontier import Arrival, Frontier
from prunekit.restoration.least_squares import HELD, Wanted, fit_towards
from prunekit.restoration.refit_targets import Site
from prunekit.restoration.samples import inputs_at, outputs_at, positions, rows_of
from prunekit.restoration.streams import scale_of
from prunekit.surgery.editing.editor import refit
from prunekit.surgery.execution.dispatch import unfused_attention

PER_INPUT, LEAST = 40, 4000  # positions that a layer is fitted at: for each input of it, and in any case
ASIDE = 5  # every so many images, one is put aside to choose the ridge by
ROUNDS = 4  # repetitions of a fit that an activation with a flat part follows; twelve gained nothing more


@dataclass(frozen=True)
class Restored:
    """The refits, in order; what failed and why; how many positions each layer was fitted to; and, for the first layer
    and for the last, to how many images.
    """

    refits: list[Refit]
    failed: dict[str, str]
    rows: dict[str, int]
    images: tuple[int, int]


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
    images: list[int] = []
    numbers, count = {site.layer: number for number, site in enumerate(sites)}, counter("refitting layers")
    with frontier, torch.no_grad(), unfused_attention():
        for done, (site, arrivals) in enumerate(frontier.arrivals()):
            count(done, len(sites))
            if not arrivals:
                continue
            generator = torch.Generator().manual_seed(seed + numbers[site.layer])
            sample = _Sample(site, arrivals, frontier.taken, _needed(arrivals[0], rows), generator)
            counts[site.layer] = sample.rows
            images.append(frontier.taken)
            try:
                found = _fitted(small, site, sample, ridge)
            except FloatingPointError as error:
                failed[site.layer] = str(error)
                continue
            refit(small, Plan(found))
            refits += found
            del arrivals, sample
    count(len(sites), len(sites))
    return Restored(refits, failed, counts, (images[0], images[-1]) if images else (0, 0))


def _needed(arrival: Arrival, rows: int) -> int:
    """Return at how many positions to look at a layer, `rows` at most: the more inputs an output has, the more."""
    call = arrival.small.call
    inputs = call.weight[0].numel()
    holdable = HELD // (inputs * call.groups * call.x.element_size())  # grouped layers have many systems, all small
    return min(rows, max(LEAST, PER_INPUT * inputs), max(2000, holdable) if call.groups > 1 else rows)


class _Sample:
    """A layer at random positions, over all batches: `parts` holds for each what arrives, and its positions in it.

    `aside` are those, `(rows,)`, of the images by which the ridge is chosen.
    """

    def __init__(
        self, site: Site, arrivals: Sequence[Arrival], images: int, wanted: int, generator: torch.Generator
    ) -> None:
        totals = [rows_of(_output(arrival)) for arrival in arrivals]
        where, start = positions(sum(totals), wanted, generator), 0
        self.rows, self.parts = len(where), list[tuple[Arrival, Tensor]]()
        for arrival, total in zip(arrivals, totals, strict=True):
            own = where[(where >= start) & (where < start + total)] - start
            self.parts += [(arrival, own)] if len(own) else []
            start += total
        self.aside = where // (sum(totals) // images) % ASIDE == ASIDE - 1
        self.joined = site.join is not None and all(_joins(arrival) for arrival, _ in self.parts)
        self._kept = site.kept

    def original(self) -> Tensor:
        """Return what the original gave on the kept channels, `(rows, C)`."""
        return torch.cat([self._cut(outputs_at(_output(arrival), own)) for arrival, own in self.parts])

    def missing(self) -> Tensor:
        """Return what the pruned network's residual stream lacks of the original's, `(rows, C)`."""
        parts = []
        for arrival, own in self.parts:
            was, now = (_as_output(stop.stream, _output(arrival)) for stop in (arrival.original, arrival.small))
            parts.append(self._cut(outputs_at(was, own)) - outputs_at(now, own))
        return torch.cat(parts)

    def inputs(self, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield what the pruned network reads there, a slice of rows at a time: `(groups, inputs, n)`."""
        start = 0
        for arrival, own in self.parts:
            for rows, part in inputs_at(arrival.small.call, own):
                yield slice(start + rows.start, start + rows.start + part.size(2)), part.to(wide)
            start += len(own)

    def _cut(self, values: Tensor) -> Tensor:
        return values if self._kept is None else values[:, self._kept.to(values.device)]


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


def _wanted(small: nn.Module, site: Site, sample: _Sample) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return the original's output, `(rows, C)`, or what brings a residual stream back to the original's; and bounds.

    An activation that alone reads what comes out may not tell numbers from one another: a ReLU negative ones, say. Then
    any output that looks to it as the original's does is as good.
    """
    output = sample.original()
    if site.join and sample.joined:
        return output + sample.missing() / scale_of(small, site.join.norm), None
    return output, None if site.flat is None else _alike(output, site.flat, *_affine(small, site.norm))


def _alike(output: Tensor, flat: tuple[float, float], scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest outputs that make the same of `scale * output + offset`, each `(rows, C)`.

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
    call, (output, bounds) = sample.parts[0][0].small.call, _wanted(small, site, sample)
    weight, groups = call.weight, call.groups
    wide = torch.promote_types(weight.dtype, torch.float32)
    layer: Any = small.get_submodule(site.layer)

    def grouped(rows: Tensor) -> Tensor:
        return rows.to(wide).reshape(len(rows), groups, -1).permute(1, 2, 0).contiguous()  # (groups, outputs, rows)

    fit = fit_towards(
        weight.reshape(groups, weight.size(0) // groups, -1),
        lambda: sample.inputs(wide),
        Wanted(grouped(output), None if bounds is None else (grouped(bounds[0]), grouped(bounds[1])), sample.aside),
        ridge,
        constant=layer.bias is not None or site.norm is not None,
        rounds=ROUNDS,
    )
    values, constant = {"weight": fit.weight.reshape(weight.shape).to(weight)}, fit.constant.flatten()
    if layer.bias is not None:
        constant = constant + layer.bias if site.added_behind else constant
        return [Refit(site.layer, {**values, "bias": constant.to(layer.bias)})]
    if site.norm is None:
        return [Refit(site.layer, values)]
    mean = small.get_buffer(f"{site.norm}.running_mean")
    return [Refit(site.layer, values), Refit(site.norm, {"running_mean": (mean - constant).to(mean)})]
