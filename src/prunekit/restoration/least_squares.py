"""Ridge regression shrunk towards weights that are there already, for several independent blocks at once.

Few images are soon learnt by heart, and no number of rows tells that, since those of one image are alike. So the ridge
is chosen by rows that are put aside, which are to be of other images: the smallest with which a fit to the others gives
them nearly as well as with any. What a large one leaves unrepaired adds up over layers, and chance does not. The fit
itself is then to all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HELD = 512 << 20  # bytes of a layer's inputs that are looked at
_BLOCK = 1024  # inputs whose products are taken at a time
_CHUNK = 1 << 24  # numbers that are added up at a time
RIDGES = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e6)  # of the mean second moment of a layer's inputs; the last changes nothing
_GROWTH = 1e4  # times the present weights: what is fitted to inputs that vary by rounding alone would be larger
# The error that a ridge may have, of the least. With 1 a ResNet-56 agreed less with its original on held-out training
# images (97.7 % instead of 98.2), and EfficientNet-Lite0 on held-out calibration images (86.3 % instead of 87.4).
_SLACK = 1.1


@dataclass(frozen=True)
class Wanted:
    """The outputs wanted of a layer, `(blocks, outputs, rows)`, and the least and greatest that are as good as these.

    Bounds are None where nothing but the output itself will do. `aside` are the rows that the ridge is chosen by,
    `(rows,)` of bool; None for none.
    """

    output: Tensor
    bounds: tuple[Tensor, Tensor] | None = None
    aside: Tensor | None = None


class Fit(NamedTuple):
    """`y ~ weight x + constant`: `weight` `(blocks, outputs, inputs)`, `constant` `(blocks, outputs, 1)`, float64."""

    weight: Tensor
    constant: Tensor


def fit_towards(
    weight: Tensor, x: Tensor, wanted: Wanted, ridge: float | None = None, *, constant: bool, rounds: int = 0
) -> Fit:
    """Minimise `mean |y - W x - c|^2 + penalty |W - weight|^2` over `W` and, with `constant`, over `c` (else zero).

    `weight` is `(blocks, outputs, inputs)`, `x` `(blocks, inputs, rows)`. The penalty is `ridge` times the mean second
    moment of the block's inputs; with None the ridge is one of `RIDGES`, by the rows that are put aside, and the first
    one where there are none.

    `y` is the output that is wanted. Where it has bounds, the fit is repeated `rounds` times, each to whatever within
    them is nearest to what the fit before gives: the majorise-minimise scheme, which never raises the distance to them.

    Raises:
        FloatingPointError: the rows are not finite, or too nearly dependent for this ridge.
    """
    rows = _Rows(x, constant)
    system = (_Sums if weight.size(2) <= rows.number else _Dual)(rows, weight.double(), wanted, ridge)
    fit = system.first()
    for _ in range(rounds if wanted.bounds else 0):
        fit = system.solve(_nearest(rows, fit, wanted))
    if not bool(torch.isfinite(fit.weight).all()):
        raise FloatingPointError("the normal equations cannot be solved")
    return Fit(fit.weight, fit.constant - fit.weight @ rows.origin.double())


def _nearest(rows: _Rows, fit: Fit, wanted: Wanted) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows, and what is wanted of a fit there."""
    assert wanted.bounds is not None
    low, high = wanted.bounds
    for part, x in rows:
        yield x, torch.clamp(_given(fit, x), low[..., part], high[..., part])


def _given(fit: Fit, x: Tensor) -> Tensor:
    return torch.baddbmm(fit.constant.to(x), fit.weight.to(x), x)


class _Rows:
    """The inputs, some rows at a time, counted from a mean: what hardly varies would drown in rounding."""

    def __init__(self, x: Tensor, centred: bool) -> None:
        self.number, self.centred = x.size(2), centred
        self._x, self._step = x, max(64, _CHUNK // max(1, x[..., 0].numel()))
        first = x[..., : self._step]
        self.origin = first.mean(2, keepdim=True) if centred else torch.zeros_like(first[..., :1])

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.number, self._step):
            part = slice(start, start + self._step)
            yield part, self._x[..., part] - self.origin


class _Moments:
    """Sums over rows of the inputs and of their products, those above the diagonal, and of what is wanted: float64."""

    def __init__(self, weight: Tensor) -> None:
        blocks, outputs, inputs = weight.shape
        self.number = 0
        self.x, self.y = weight.new_zeros(blocks, inputs, 1), weight.new_zeros(blocks, outputs, 1)
        self.xx, self.yx = weight.new_zeros(blocks, inputs, inputs), weight.new_zeros(blocks, outputs, inputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows `x`, `(blocks, inputs, n)`, of which `y` is wanted, `(blocks, outputs, n)`."""
        self.number += x.size(2)
        self.x += x.sum(2, keepdim=True)
        self.y += y.sum(2, keepdim=True)
        for start in range(0, x.size(1), _BLOCK):  # above the diagonal alone
            block = slice(start, start + _BLOCK)
            self.xx[:, block, start:] += x[:, block] @ x[:, start:].mT
        self.yx += y @ x.mT

    def means(self, centred: bool) -> tuple[Tensor, Tensor]:
        """Return the means of the inputs and of what is wanted; zeros where no constant is fitted."""
        return (self.x / self.number, self.y / self.number) if centred else (0 * self.x, 0 * self.y)

    def covariance(self, mean: Tensor) -> Tensor:
        """Return the products of the inputs about their mean, a row."""
        full = self.xx.triu()
        full += full.triu(1).mT
        return torch.baddbmm(full, mean, mean.mT, beta=1 / self.number, alpha=-1)


class _Sums:
    """Normal equations, summed over chunks; what is kept is `inputs x inputs` for each block."""

    def __init__(self, rows: _Rows, weight: Tensor, wanted: Wanted, ridge: float | None) -> None:
        self._rows, self._weight, self._wanted = rows, weight, wanted
        self._floor = _floor(weight, wanted.output)
        aside = torch.zeros(rows.number, dtype=torch.bool) if ridge is not None else wanted.aside
        if aside is None or bool(aside.all()):
            aside = torch.zeros(rows.number, dtype=torch.bool)
        known = _Moments(weight)
        self._add(known, ~aside)
        if ridge is None:
            ridge = self._best(known, aside) if bool(aside.any()) else RIDGES[0]
        self._add(known, aside)
        self._mean, self._level = known.means(rows.centred)
        self._cross, moments = known.yx / rows.number, known.covariance(self._mean)
        del known
        self._explained = weight @ moments
        self._factor = self._factored(moments, ridge)

    def _factored(self, moments: Tensor, ridge: float) -> Tensor:
        """Return the factor of moments with the penalty on their diagonal."""
        ridged = moments.clone()
        spread = ridged.diagonal(dim1=1, dim2=2)
        spread.add_(_penalty(spread.mean(1), ridge, self._floor)[:, None])
        return _factor(ridged)

    def _add(self, sums: _Moments, chosen: Tensor) -> None:
        """Add the rows that are chosen, `(rows,)`."""
        for x, y in self._of(chosen):
            sums.add(x, y)

    def _of(self, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if not bool(chosen.any()):
            return
        for part, x in self._rows:
            here, y = chosen[part].to(x.device), self._wanted.output[..., part]
            yield (x, y) if bool(here.all()) else (x[..., here], y[..., here])

    def _best(self, known: _Moments, aside: Tensor) -> float:
        """Return the ridge with which a fit to the known rows gives those put aside."""
        mean, level = known.means(self._rows.centred)
        moments = known.covariance(mean)
        rest = (known.yx / known.number - level @ mean.mT - self._weight @ moments).mT
        fits = []
        for ridge in RIDGES:
            weight = self._weight + torch.cholesky_solve(rest, self._factored(moments, ridge)).mT
            fits.append(Fit(weight, level - weight @ mean))
        errors = torch.zeros(len(RIDGES), *level.shape[:2]).to(level)
        for x, y in self._of(aside):
            errors += torch.stack([(_given(fit, x) - y).square().sum(2) for fit in fits])
        wanted = self._wanted.output[..., aside.to(level.device)].double()
        scale = wanted.size(2) * wanted.var(2, correction=0).clamp_min(1e-30)
        return _smallest((errors / scale).mean((1, 2)).tolist())

    def first(self) -> Fit:
        """Return the fit to the output that is wanted, which has been summed."""
        return self._towards(self._cross, self._level)

    def solve(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Fit:
        """Return the fit of rows `x`, as they are counted, to `y`."""
        cross, mean = torch.zeros_like(self._explained), torch.zeros_like(self._weight[..., :1])
        for x, y in parts:
            cross += y @ x.mT
            mean += y.sum(2, keepdim=True)
        cross /= self._rows.number
        return self._towards(cross, mean / self._rows.number if self._rows.centred else torch.zeros_like(mean))

    def _towards(self, cross: Tensor, mean: Tensor) -> Fit:
        rest = cross - mean @ self._mean.mT - self._explained  # of what the present weights leave
        weight = self._weight + torch.cholesky_solve(rest.mT, self._factor).mT
        return Fit(weight, mean - weight @ self._mean)


class _Dual:
    """The same with all rows kept: the smaller system where there are fewer rows than inputs."""

    def __init__(self, rows: _Rows, weight: Tensor, wanted: Wanted, ridge: float | None) -> None:
        self._rows, self._weight, self._output = rows, weight, wanted.output
        self._floor = _floor(weight, wanted.output)
        self._x = torch.cat([part.double() for _, part in rows], 2)
        aside = wanted.aside
        if ridge is None:
            both = aside is not None and bool(aside.any()) and not bool(aside.all())
            ridge = self._best(wanted.output, aside.to(self._x.device)) if both and aside is not None else RIDGES[0]
        self._mean = self._mean_of(self._x)
        self._x -= self._mean
        self._explained = weight @ self._x
        self._factor = self._factored(self._x, ridge)

    def _mean_of(self, values: Tensor) -> Tensor:
        return values.mean(2, keepdim=True) if self._rows.centred else torch.zeros_like(values[..., :1])

    def _factored(self, x: Tensor, ridge: float) -> Tensor:
        moments = x.mT @ x
        penalty = _penalty(x.square().mean((1, 2)), ridge, self._floor)
        moments.diagonal(dim1=1, dim2=2).add_(x.size(2) * penalty[:, None])
        return _factor(moments)

    def _best(self, output: Tensor, aside: Tensor) -> float:
        """Return the same as `_Sums._best`."""
        y = output.double()
        mean, level = self._mean_of(self._x[..., ~aside]), self._mean_of(y[..., ~aside])
        known, unknown = self._x[..., ~aside] - mean, self._x[..., aside] - mean
        rest, left = (y[..., part] - level - self._weight @ x for part, x in ((~aside, known), (aside, unknown)))
        likeness, scale = known.mT @ unknown, y[..., aside].var(2, correction=0).clamp_min(1e-30)
        errors = []
        for ridge in RIDGES:
            given = torch.cholesky_solve(rest.mT, self._factored(known, ridge)).mT @ likeness
            errors.append(float(((left - given).square().mean(2) / scale).mean()))
        return _smallest(errors)

    def first(self) -> Fit:
        """Return the same as `_Sums.first`."""
        return self._towards(self._output.double())

    def solve(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Fit:
        """Return the same as `_Sums.solve`: `Y (X^T X + rows penalty)^-1 X^T`."""
        return self._towards(torch.cat([part.double() for _, part in parts], 2))

    def _towards(self, y: Tensor) -> Fit:
        mean = self._mean_of(y)
        rest = (y - mean - self._explained).mT
        weight = self._weight + torch.cholesky_solve(rest, self._factor).mT @ self._x.mT
        return Fit(weight, mean - weight @ self._mean)


def _smallest(errors: Sequence[float]) -> float:
    """Return the smallest ridge that errs hardly more than the best; the last one where none errs less than that."""
    if errors[-1] <= min(errors):
        return RIDGES[-1]
    return next(
        (ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= _SLACK * min(errors)), RIDGES[0]
    )


def _floor(weight: Tensor, output: Tensor) -> Tensor:
    """Return the least penalty, `(blocks,)`: it keeps weights that make outputs of such a variance from growing to
    `_GROWTH` times the present ones.
    """
    size = weight.square().sum(2).mean(1)
    return output.var(2, correction=0).mean(1).double() / (4 * _GROWTH**2 * size.clamp_min(1e-30))


def _penalty(spread: Tensor, ridge: float, floor: Tensor) -> Tensor:
    """Return the penalty, `(blocks,)`, by the mean square of the inputs; those that never vary keep their weights."""
    penalty = torch.maximum(ridge * spread, floor)
    return torch.where(penalty > 0, penalty, 1.0)


def _factor(moments: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(moments)
    if bool(failed.any()) or not bool(torch.isfinite(factor).all()):
        raise FloatingPointError("the normal equations cannot be solved")
    return factor
