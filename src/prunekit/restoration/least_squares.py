"""Ridge regression shrunk towards weights that are there already, for several independent blocks at once.

Few images are soon learnt by heart, and no number of rows tells that, since those of one image are alike. So the ridge
is chosen by rows that are put aside, which are to be of other images: the smallest with which a fit to the others gives
them nearly as well as with any. What a large one leaves unrepaired adds up over layers, and chance does not. The fit
itself is then to all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HELD = 512 << 20  # bytes of inputs that are held; beyond that each round asks for them again
RIDGES = (1e-2, 1e-1, 1.0, 1e1, 1e2)  # of the mean second moment of a layer's inputs
# The error that a ridge may have, of the least. With 1 a ResNet-56 agreed less with its original on held-out training
# images (97.7 % instead of 98.2), and EfficientNet-Lite0 on held-out calibration images (86.3 % instead of 87.4).
_SLACK = 1.1

Chunks = Callable[[], Iterable[tuple[slice, Tensor]]]


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
    weight: Tensor, chunks: Chunks, wanted: Wanted, ridge: float | None = None, *, constant: bool, rounds: int = 0
) -> Fit:
    """Minimise `mean |y - W x - c|^2 + penalty |W - weight|^2` over `W` and, with `constant`, over `c` (else zero).

    `weight` is `(blocks, outputs, inputs)`; each call of `chunks` yields all of `x`, a slice of the rows at a time:
    `(blocks, inputs, n)`. The penalty is `ridge` times the mean second moment of the block's inputs; with None the
    ridge is one of `RIDGES`, by the rows that are put aside, and the first one where there are none.

    `y` is the output that is wanted. Where it has bounds, the fit is repeated `rounds` times, each to whatever within
    them is nearest to what the fit before gives: the majorise-minimise scheme, which never raises the distance to them.

    Raises:
        FloatingPointError: the rows are not finite, or too nearly dependent for this ridge.
    """
    rows = _Rows(chunks, wanted.output.size(2), constant)
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
        given = torch.baddbmm(fit.constant.to(x), fit.weight.to(x), x)
        yield x, torch.clamp(given, low[..., part], high[..., part])


class _Rows:
    """The inputs, counted from the mean of the first chunk: what hardly varies would drown in rounding."""

    def __init__(self, chunks: Chunks, number: int, centred: bool) -> None:
        first = next(iter(chunks()))[1]
        self.number, self.centred = number, centred
        self.origin = first.mean(2, keepdim=True) if centred else torch.zeros_like(first[..., :1])
        self._chunks = chunks
        size = number * first[..., :1].nbytes
        self._held = list(self._counted()) if size <= HELD else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        return self._counted() if self._held is None else iter(self._held)

    def _counted(self) -> Iterator[tuple[slice, Tensor]]:
        return ((part, x - self.origin) for part, x in self._chunks())


class _Moments:
    """Sums over some rows of the inputs and of their products, and of what is wanted: float64."""

    def __init__(self, weight: Tensor) -> None:
        blocks, outputs, inputs = weight.shape
        self.number = 0
        self.x, self.y = weight.new_zeros(blocks, inputs, 1), weight.new_zeros(blocks, outputs, 1)
        self.xx, self.yx = weight.new_zeros(blocks, inputs, inputs), weight.new_zeros(blocks, outputs, inputs)
        self.yy = weight.new_zeros(blocks, outputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows `x`, `(blocks, inputs, n)`, of which `y` is wanted, `(blocks, outputs, n)`."""
        self.number += x.size(2)
        self.x += x.sum(2, keepdim=True)
        self.y += y.sum(2, keepdim=True)
        self.xx += x @ x.mT
        self.yx += y @ x.mT
        self.yy += y.square().sum(2)

    def include(self, others: _Moments) -> None:
        """Add the rows of others."""
        self.number += others.number
        for name in ("x", "y", "xx", "yx", "yy"):
            getattr(self, name).add_(getattr(others, name))

    def means(self, centred: bool) -> tuple[Tensor, Tensor]:
        """Return the means of the inputs and of what is wanted; zeros where no constant is fitted."""
        number = max(1, self.number)
        return (self.x / number, self.y / number) if centred else (torch.zeros_like(self.x), torch.zeros_like(self.y))

    def covariance(self, mean: Tensor) -> Tensor:
        """Return the products of the inputs about their mean, a row."""
        return self.xx / max(1, self.number) - mean @ mean.mT

    def error(self, fit: Fit) -> Tensor:
        """Return the mean square error of a fit, as a share of the variance of what is wanted: `(blocks, outputs)`."""
        weight, c = fit.weight, fit.constant
        rest = self.yx - c @ self.x.mT
        squares = self.yy + (c * (c * self.number - 2 * self.y)).squeeze(2)
        squares = squares + ((weight @ self.xx - 2 * rest) * weight).sum(2)
        mean = self.y.squeeze(2) / self.number
        return squares / (self.yy - self.number * mean.square()).clamp_min(1e-30)


class _Sums:
    """Normal equations, summed over chunks; what is kept is `inputs x inputs` for each block."""

    def __init__(self, rows: _Rows, weight: Tensor, wanted: Wanted, ridge: float | None) -> None:
        self._rows, self._weight = rows, weight
        known, aside = _Moments(weight), _Moments(weight)
        for part, x in rows:
            y = wanted.output[..., part]
            if ridge is not None or wanted.aside is None:
                known.add(x, y)
                continue
            off = wanted.aside[part].to(x.device)
            known.add(x[..., ~off], y[..., ~off])
            aside.add(x[..., off], y[..., off])
        if ridge is None:
            ridge = self._best(known, aside) if known.number and aside.number else RIDGES[0]
        known.include(aside)
        self._mean, self._level = known.means(rows.centred)
        self._cross, moments = known.yx / rows.number, known.covariance(self._mean)
        self._explained = weight @ moments
        self._factor = _factor(_ridged(moments, ridge))

    def _best(self, known: _Moments, aside: _Moments) -> float:
        """Return the ridge with which a fit to the known rows gives those put aside."""
        mean, level = known.means(self._rows.centred)
        moments = known.covariance(mean)
        rest = (known.yx / known.number - level @ mean.mT - self._weight @ moments).mT
        errors = []
        for ridge in RIDGES:
            step = torch.cholesky_solve(rest, _factor(_ridged(moments, ridge))).mT
            weight = self._weight + step
            errors.append(float(aside.error(Fit(weight, level - weight @ mean)).mean()))
        return _smallest(errors)

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
        moments.diagonal(dim1=1, dim2=2).add_(x.size(2) * _penalty(x.square().mean((1, 2)), ridge)[:, None])
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
    """Return the smallest ridge that errs hardly more than the best."""
    return next(
        (ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= _SLACK * min(errors)), RIDGES[0]
    )


def _ridged(moments: Tensor, ridge: float) -> Tensor:
    """Return moments with the penalty on their diagonal."""
    penalty = _penalty(moments.diagonal(dim1=1, dim2=2).mean(1), ridge)
    return moments + penalty[:, None, None] * torch.eye(moments.size(1)).to(moments)


def _penalty(spread: Tensor, ridge: float) -> Tensor:
    """Return the penalty, `(blocks,)`: inputs that never vary keep their weights."""
    return torch.where(spread > 0, ridge * spread, 1.0)


def _factor(moments: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(moments)
    if bool(failed.any()) or not bool(torch.isfinite(factor).all()):
        raise FloatingPointError("the normal equations cannot be solved")
    return factor
