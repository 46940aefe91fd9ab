"""Ridge regression shrunk towards weights that are there already, for several independent blocks at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HELD = 512 << 20  # bytes of inputs that are held; beyond that each round asks for them again

Chunks = Callable[[], Iterable[tuple[slice, Tensor]]]


@dataclass(frozen=True)
class Wanted:
    """The outputs wanted of a layer, `(blocks, outputs, rows)`, and the least and greatest that are as good as these.

    Bounds are None where nothing but the output itself will do.
    """

    output: Tensor
    bounds: tuple[Tensor, Tensor] | None = None


class Fit(NamedTuple):
    """`y ~ weight x + constant`: `weight` `(blocks, outputs, inputs)`, `constant` `(blocks, outputs, 1)`, float64."""

    weight: Tensor
    constant: Tensor


def fit_towards(
    weight: Tensor, chunks: Chunks, wanted: Wanted, ridge: float, *, constant: bool, rounds: int = 0
) -> Fit:
    """Minimise `mean |y - W x - c|^2 + penalty |W - weight|^2` over `W` and, with `constant`, over `c` (else zero).

    `weight` is `(blocks, outputs, inputs)`; each call of `chunks` yields all of `x`, a slice of the rows at a time:
    `(blocks, inputs, n)`. The penalty is `ridge` times the mean second moment of the block's inputs.

    `y` is the output that is wanted. Where it has bounds, the fit is repeated `rounds` times, each to whatever within
    them is nearest to what the fit before gives: the majorise-minimise scheme, which never raises the distance to them.

    Raises:
        FloatingPointError: the rows are not finite, or too nearly dependent for this ridge.
    """
    rows = _Rows(chunks, wanted.output.size(2), constant)
    system = (_Sums if weight.size(2) <= rows.number else _Dual)(rows, weight.double(), ridge)
    fit = system.solve((x, wanted.output[..., part]) for part, x in rows)
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


class _Sums:
    """Normal equations, summed over chunks in float64; what is kept is `inputs x inputs` for each block."""

    def __init__(self, rows: _Rows, weight: Tensor, ridge: float) -> None:
        self._rows, self._weight = rows, weight
        moments = torch.zeros(len(weight), weight.size(2), weight.size(2), dtype=torch.float64, device=weight.device)
        mean = torch.zeros_like(weight[:, :1])
        for _, x in rows:
            moments += x @ x.transpose(1, 2)
            mean += x.sum(2)[:, None]
        moments /= rows.number
        self._mean = mean / rows.number if rows.centred else torch.zeros_like(mean)
        moments -= self._mean.transpose(1, 2) * self._mean
        self._explained = weight @ moments
        penalty = _penalty(moments.diagonal(dim1=1, dim2=2).mean(1), ridge)
        moments.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
        self._factor = _factor(moments)

    def solve(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Fit:
        """Return the fit of rows `x`, as they are counted, to `y`."""
        cross, mean = torch.zeros_like(self._explained), torch.zeros_like(self._weight[..., :1])
        for x, y in parts:
            cross += y @ x.transpose(1, 2)
            mean += y.sum(2, keepdim=True)
        cross /= self._rows.number
        mean = mean / self._rows.number if self._rows.centred else torch.zeros_like(mean)
        rest = cross - mean * self._mean - self._explained  # of what the present weights leave
        weight = self._weight + torch.cholesky_solve(rest.transpose(1, 2), self._factor).transpose(1, 2)
        return Fit(weight, mean - weight @ self._mean.transpose(1, 2))


class _Dual:
    """The same with all rows kept: the smaller system where there are fewer rows than inputs."""

    def __init__(self, rows: _Rows, weight: Tensor, ridge: float) -> None:
        self._rows, self._weight = rows, weight
        x = torch.cat([part.double() for _, part in rows], 2)
        self._mean = x.mean(2, keepdim=True) if rows.centred else torch.zeros_like(x[..., :1])
        self._x = x - self._mean
        self._explained = weight @ self._x
        penalty = _penalty(self._x.square().mean((1, 2)), ridge)
        moments = self._x.transpose(1, 2) @ self._x
        moments.diagonal(dim1=1, dim2=2).add_(rows.number * penalty[:, None])
        self._factor = _factor(moments)

    def solve(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Fit:
        """Return the same as `_Sums.solve`: `Y (X^T X + rows penalty)^-1 X^T`."""
        y = torch.cat([part.double() for _, part in parts], 2)
        mean = y.mean(2, keepdim=True) if self._rows.centred else torch.zeros_like(y[..., :1])
        rest = (y - mean - self._explained).transpose(1, 2)
        weight = self._weight + torch.cholesky_solve(rest, self._factor).transpose(1, 2) @ self._x.transpose(1, 2)
        return Fit(weight, mean - weight @ self._mean)


def _penalty(spread: Tensor, ridge: float) -> Tensor:
    """Return the penalty, `(blocks,)`: inputs that never vary keep their weights."""
    return torch.where(spread > 0, ridge * spread, 1.0)


def _factor(moments: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(moments)
    if bool(failed.any()) or not bool(torch.isfinite(factor).all()):
        raise FloatingPointError("the normal equations cannot be solved")
    return factor
