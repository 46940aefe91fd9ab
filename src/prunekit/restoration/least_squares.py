"""Ridge regression shrunk towards weights that are there already, for several independent blocks at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Chunks = Callable[[], Iterable[tuple[slice, Tensor]]]
Relax = Callable[[slice, Tensor], Tensor]


class Fit(NamedTuple):
    """`y ~ weight x + constant`: `weight` `(blocks, outputs, inputs)`, `constant` `(blocks, outputs)`, both float64."""

    weight: Tensor
    constant: Tensor


class _Sums:
    """Normal equations, summed over rows in float64; what is kept is `inputs x inputs` for each block.

    With `centred`, rows are counted from the mean of the first chunk: inputs that hardly vary would drown in rounding.
    """

    def __init__(self, chunks: Chunks, rows: int, ridge: float, centred: bool) -> None:
        self._rows, self._centred = rows, centred
        moments: Tensor | None = None
        for _, x in chunks():
            if moments is None:
                self._origin = _mean(x, centred).to(x)
                moments, mean = torch.zeros(()), torch.zeros(())
            x = x - self._origin
            moments = moments + (x.transpose(1, 2) @ x).double() / rows
            mean = mean + x.sum(1, keepdim=True).double() / rows
        assert moments is not None
        self._mean = mean if centred else torch.zeros_like(mean)
        moments = moments - self._mean.transpose(1, 2) * self._mean
        penalty = _penalty(moments.diagonal(dim1=1, dim2=2).mean(1), ridge)
        moments.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
        self._factor = _factor(moments)

    def solve(self, parts: Iterable[tuple[slice, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return coefficients `(blocks, inputs, outputs)` and constants `(blocks, 1, outputs)`, from rows `x`, `y`."""
        cross, mean = torch.zeros(()), torch.zeros(())
        for _, x, y in parts:
            cross = cross + ((x - self._origin).transpose(1, 2) @ y).double() / self._rows
            mean = mean + y.sum(1, keepdim=True).double() / self._rows
        mean = mean if self._centred else torch.zeros_like(mean)
        beta = torch.cholesky_solve(cross - self._mean.transpose(1, 2) * mean, self._factor)
        return beta, mean - (self._mean + self._origin) @ beta


class _Rows:
    """The same with all rows kept: the smaller system where there are fewer rows than inputs."""

    def __init__(self, chunks: Chunks, rows: int, ridge: float, centred: bool) -> None:
        self._centred = centred
        x = torch.cat([part.double() for _, part in chunks()], 1)
        self._mean = _mean(x, centred)
        self._x = x - self._mean
        penalty = _penalty(self._x.square().mean((1, 2)), ridge)
        moments = self._x @ self._x.transpose(1, 2)
        moments.diagonal(dim1=1, dim2=2).add_(rows * penalty[:, None])
        self._factor = _factor(moments)

    def solve(self, parts: Iterable[tuple[slice, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the same as `_Sums.solve`: `X^T (X X^T + rows penalty)^-1 Y`."""
        y = torch.cat([part.double() for _, _, part in parts], 1)
        mean = _mean(y, self._centred)
        beta = self._x.transpose(1, 2) @ torch.cholesky_solve(y - mean, self._factor)
        return beta, mean - self._mean @ beta


def fit_towards(
    weight: Tensor,
    chunks: Chunks,
    wanted: Tensor,
    ridge: float,
    *,
    constant: bool,
    relax: Relax | None = None,
    rounds: int = 0,
) -> Fit:
    """Minimise `mean |y - W x - c|^2 + penalty |W - weight|^2` over `W` and, with `constant`, over `c` (else zero).

    `weight` is `(blocks, outputs, inputs)`, `wanted` is `y`, `(blocks, rows, outputs)`; each call of `chunks` yields
    the rows of `x` from the first to the last, `(blocks, n, inputs)`. The penalty is `ridge` times the mean second
    moment of the block's inputs.

    `relax(rows, given)` says what is wanted once the fit gives `given`, `(blocks, n, outputs)`: where the loss is flat,
    what is given already. The fit is then repeated `rounds` times, each from what the one before it gives: the
    majorise-minimise scheme, which never raises the loss.

    Raises:
        FloatingPointError: the rows are not finite, or too nearly dependent for this ridge.
    """
    weight, rows = weight.double(), wanted.size(1)
    system = (_Sums if weight.size(2) <= rows else _Rows)(chunks, rows, ridge, constant)
    fit: Fit | None = None

    def residuals() -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield what the present weights leave to explain."""
        for part, x in chunks():
            y = wanted[:, part].to(x)
            if fit is not None and relax is not None:
                y = relax(part, x @ fit.weight.to(x).transpose(1, 2) + fit.constant.unsqueeze(1).to(x))
            yield part, x, y - x @ weight.to(x).transpose(1, 2)

    for _ in range(1 + (rounds if relax else 0)):
        beta, rest = system.solve(residuals())
        fit = Fit(weight + beta.transpose(1, 2), rest.squeeze(1))
    assert fit is not None
    if not bool(torch.isfinite(fit.weight).all()):
        raise FloatingPointError("the normal equations cannot be solved")
    return fit


def _mean(side: Tensor, centred: bool) -> Tensor:
    """Return the mean over the rows, in float64; zeros where there is to be no constant."""
    mean = side.mean(1, keepdim=True, dtype=torch.float64)
    return mean if centred else torch.zeros_like(mean)


def _penalty(spread: Tensor, ridge: float) -> Tensor:
    """Return the penalty, `(blocks,)`: inputs that never vary keep their weights."""
    return torch.where(spread > 0, ridge * spread, 1.0)


def _factor(moments: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(moments)
    if bool(failed.any()) or not bool(torch.isfinite(factor).all()):
        raise FloatingPointError("the normal equations cannot be solved")
    return factor
