"""Ridge regression shrunk towards weights that are there already, for several independent blocks at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Fit(NamedTuple):
    """`y ~ weight x + constant`: `weight` `(blocks, outputs, inputs)`, `constant` `(blocks, outputs)`, both float64."""

    weight: Tensor
    constant: Tensor


class _Sums:
    """Normal equations, summed over rows in float64; what is kept is `inputs x (inputs + outputs)` for each block.

    With `centred`, rows are counted from the mean of the first chunk: inputs that hardly vary would drown in rounding.
    """

    def __init__(self, centred: bool) -> None:
        self._centred = centred
        self._origin: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        if self._origin is None:
            mean_x, mean_y = _means(x, y, self._centred)
            self._origin = mean_x.to(x), mean_y.to(y)
        x, y = x - self._origin[0], y - self._origin[1]
        xt = x.transpose(1, 2)
        new = [part.double() for part in (xt @ x, xt @ y, x.sum(1, keepdim=True), y.sum(1, keepdim=True))]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new

    def solve(self, rows: int, ridge: float) -> tuple[Tensor, Tensor]:
        """Coefficients `(blocks, inputs, outputs)` and constants `(blocks, 1, outputs)`."""
        assert self._origin is not None
        xx, xy, x, y = (part / rows for part in self._sums)
        if not self._centred:
            x, y = torch.zeros_like(x), torch.zeros_like(y)
        moments, cross = xx - x.transpose(1, 2) * x, xy - x.transpose(1, 2) * y
        penalty = _penalty(moments.diagonal(dim1=1, dim2=2).mean(1), ridge)
        moments.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
        beta = torch.cholesky_solve(cross, _factor(moments))
        return beta, y + self._origin[1] - (x + self._origin[0]) @ beta


class _Rows:
    """The same with all rows kept: the smaller system where there are fewer rows than inputs."""

    def __init__(self, centred: bool) -> None:
        self._centred = centred
        self._rows: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        self._rows.append((x.double(), y.double()))

    def solve(self, rows: int, ridge: float) -> tuple[Tensor, Tensor]:
        """As `_Sums.solve`: `X^T (X X^T + rows penalty)^-1 Y`."""
        x, y = (torch.cat(parts, 1) for parts in zip(*self._rows, strict=True))
        means = _means(x, y, self._centred)
        x, y = x - means[0], y - means[1]
        penalty = _penalty(x.square().mean((1, 2)), ridge)
        moments = x @ x.transpose(1, 2)
        moments.diagonal(dim1=1, dim2=2).add_(rows * penalty[:, None])
        beta = x.transpose(1, 2) @ torch.cholesky_solve(y, _factor(moments))
        return beta, means[1] - means[0] @ beta


def fit_towards(
    weight: Tensor, chunks: Iterable[tuple[Tensor, Tensor]], rows: int, ridge: float, *, constant: bool
) -> Fit:
    """Minimise `mean |y - W x - c|^2 + penalty |W - weight|^2` over `W` and, with `constant`, over `c` (else zero).

    `weight` is `(blocks, outputs, inputs)`; `chunks` yields `x` `(blocks, n, inputs)` and `y` `(blocks, n, outputs)`,
    `rows` of them in all. The penalty is `ridge` times the mean second moment of the block's inputs.

    Raises:
        FloatingPointError: the rows are not finite, or too nearly dependent for this ridge.
    """
    weight = weight.double()
    system = (_Sums if weight.size(2) <= rows else _Rows)(constant)
    for x, y in chunks:
        system.add(x, y - x @ weight.to(x).transpose(1, 2))  # the residual: what the present weights leave to explain
    beta, rest = system.solve(rows, ridge)
    return Fit(weight + beta.transpose(1, 2), rest.squeeze(1))


def _means(x: Tensor, y: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Of both sides over the rows, in float64; zeros where there is to be no constant."""
    first, second = (side.mean(1, keepdim=True, dtype=torch.float64) for side in (x, y))
    return (first, second) if centred else (torch.zeros_like(first), torch.zeros_like(second))


def _penalty(spread: Tensor, ridge: float) -> Tensor:
    """`(blocks,)`: inputs that never vary keep their weights."""
    return torch.where(spread > 0, ridge * spread, 1.0)


def _factor(moments: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(moments)
    if bool(failed.any()) or not bool(torch.isfinite(factor).all()):
        raise FloatingPointError("the normal equations cannot be solved")
    return factor
