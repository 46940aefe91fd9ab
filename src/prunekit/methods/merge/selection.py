"""Selection of the channels that stay, and of their number in each layer, by the loss that they leave unexplained.

Of the covariance `S` of all channels, a kept channel explains `s s^T / (S_ii + ridge)` with `s` its column: one step of
a pivoted Cholesky factorisation. What a layer then loses is `tr(gram S)` (`prunekit.restoration.second_moments`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunekit.restoration.second_moments import Reading

_RIDGE = 1e-3  # of the mean variance: below that, channels are alike
_BLOCK = 128  # steps between two updates of the matrices


def pivoted(reading: Reading) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return all units, each the one that explains most of what the consumers read once those before it are kept.

    Also, what is lost with the first `n` of them kept, as `losses` tells.
    """
    unexplained = _unexplained(reading)
    order, found = [], [unexplained.loss]
    for _ in range(len(reading.gram) // reading.width):
        order.append(unexplained.keep_best())
        found.append(unexplained.loss)
    return np.array(order, dtype=np.int64), _falling(found)


def losses(reading: Reading, order: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the relative loss with the first `n` units of `order` kept, for `n` from 0 to all: `(units + 1,)`."""
    unexplained = _unexplained(reading)
    found = [unexplained.loss]
    for unit in order:
        unexplained.keep(int(unit))
        found.append(unexplained.loss)
    return _falling(found)


def _falling(found: Sequence[float]) -> NDArray[np.float64]:
    return np.minimum.accumulate(np.maximum(0.0, np.array(found)))


def _unexplained(reading: Reading) -> _Unexplained | _UnexplainedHeads:
    return _Unexplained(reading) if reading.width == 1 else _UnexplainedHeads(reading)


class _UnexplainedHeads:
    """The same for units of several channels, of which there are few: with `S_u` the columns of unit `u`, what is left
    is `S - S_u (S_uu + ridge)^-1 S_u^T`, and the loss falls by `tr((S_uu + ridge)^-1 (S G S)_uu)`.
    """

    def __init__(self, reading: Reading) -> None:
        self._s, self._gram = reading.covariance.detach().double(), reading.gram.detach().double()
        self._width, self._left = reading.width, set(range(len(self._s) // reading.width))
        mean = self._s.diagonal().mean()
        self._ridge = float(_RIDGE * mean) if mean > 0 else 1.0

    @property
    def loss(self) -> float:
        return float((self._gram * self._s).sum())

    def keep_best(self) -> int:
        """Keep the unit that lowers the loss most, and return it."""
        read = self._s @ self._gram @ self._s
        gains = {unit: self._solved(unit, self._block(read, unit)).trace() for unit in sorted(self._left)}
        unit = max(gains, key=lambda unit: float(gains[unit]))
        self.keep(unit)
        return unit

    def keep(self, unit: int) -> None:
        """Take out what `unit` explains."""
        columns = self._s[:, unit * self._width : (unit + 1) * self._width]
        self._s = self._s - columns @ self._solved(unit, columns.t())
        self._left.remove(unit)

    def _solved(self, unit: int, right: Tensor) -> Tensor:
        own = self._block(self._s, unit)
        found: Tensor = torch.linalg.solve(own + self._ridge * torch.eye(self._width).to(own), right)
        return found

    def _block(self, matrix: Tensor, unit: int) -> Tensor:
        own = slice(unit * self._width, (unit + 1) * self._width)
        return matrix[own, own]


class _Unexplained:
    """What the channels kept so far leave of `S` and `T = S G S`, for those that are not kept; and `loss`, `tr(G S)`.

    With `s` and `t` the columns of a channel that is kept next and `p = s_i + ridge` its pivot, what is left is

        S - c c^T  and  T - c d^T - d c^T,  with  c = s / sqrt(p)  and  d = (t - t_i s / (2 p)) / sqrt(p),

    the loss falls by `t_i / p`, and what a channel would explain is `diag(T) / (diag(S) + ridge)`. As in LAPACK's
    pivoted Cholesky factorisation (`dpstrf`), the diagonals are always up to date, the matrices a block of steps later:
    a column in between is what it was at the block's start less a few outer products. So nearly all work is in products
    of matrices, half of it on ever fewer channels.
    """

    def __init__(self, reading: Reading) -> None:
        self._s, gram = reading.covariance.detach().double(), reading.gram.detach().double()
        self._t = self._s @ gram @ self._s
        self.loss = float((gram * self._s.t()).sum())
        mean = self._s.diagonal().mean()
        self._ridge = float(_RIDGE * mean) if mean > 0 else 1.0
        self._begin(torch.arange(len(gram), device=gram.device))

    def _begin(self, units: Tensor) -> None:
        """Begin a block, with the channels that are left."""
        self._units, self._steps = units, 0
        self._variances, self._gains = self._s.diagonal().clone(), self._t.diagonal().clone()
        self._left = torch.ones_like(units, dtype=torch.bool)
        self._c, self._d = self._s.new_empty(2, min(_BLOCK, len(units)), len(units))

    def keep_best(self) -> int:
        """Keep the unit that lowers the loss most, and return it."""
        gains = self._gains / (self._variances.clamp_min(0) + self._ridge)
        place = int(torch.where(self._left, gains, -torch.inf).argmax())
        unit = int(self._units[place])
        self._keep(place)
        return unit

    def keep(self, unit: int) -> None:
        """Take out what `unit` explains."""
        self._keep(int(torch.searchsorted(self._units, unit)))

    def _keep(self, place: int) -> None:
        c, d = self._c[: self._steps], self._d[: self._steps]
        own = self._s[place] - c[:, place] @ c
        read = self._t[place] - c[:, place] @ d - d[:, place] @ c
        pivot, worth = float(own[place].clamp_min(0)) + self._ridge, float(read[place])
        c, d = own / math.sqrt(pivot), (read - own * (worth / (2 * pivot))) / math.sqrt(pivot)
        self._variances -= c.square()
        self._gains -= 2 * c * d
        self.loss -= worth / pivot
        self._c[self._steps], self._d[self._steps] = c, d
        self._left[place] = False
        self._steps += 1
        if self._steps == len(self._c):
            self._end()

    def _end(self) -> None:
        """End a block: bring the matrices up to date, for the channels that are left."""
        left = self._left.nonzero().squeeze(1)
        c, d = self._c[:, left], self._d[:, left]
        self._s = self._s[left][:, left].addmm_(c.t(), c, alpha=-1)
        self._t = self._t[left][:, left].addmm_(c.t(), d, alpha=-1).addmm_(d.t(), c, alpha=-1)
        self._begin(self._units[left])


def removals(curves: Sequence[NDArray[np.float64]], costs: Sequence[float], least: Sequence[int]) -> list[int]:
    """Return the order in which to narrow the layers, one channel at a time: the number of the layer, for each step.

    `curves[i][n]` is what layer `i` loses with `n` channels, `costs[i]` what a channel of it costs. Steps go by loss
    per cost along the lower convex hull of each curve, which is what is best for every budget; layer `i` keeps at
    least `least[i]`.
    """
    layer, slope = [], []
    for number, (curve, cost, floor) in enumerate(zip(curves, costs, least, strict=True)):
        steps = _hull_slopes(curve[::-1][: len(curve) - floor])
        layer += [number] * len(steps)
        slope += [step / cost for step in steps]
    return [layer[i] for i in np.argsort(np.array(slope), kind="stable")]


def _hull_slopes(loss: NDArray[np.float64]) -> list[float]:
    """Return the slopes of the lower convex hull of `loss` over 0, 1, 2, ..., one for each step."""
    corners = [0]
    for point in range(1, len(loss)):
        while len(corners) > 1 and _slope(loss, corners[-2], corners[-1]) >= _slope(loss, corners[-1], point):
            corners.pop()
        corners.append(point)
    slopes: list[float] = []
    for start, end in itertools.pairwise(corners):
        slopes += [_slope(loss, start, end)] * (end - start)
    return slopes


def _slope(loss: NDArray[np.float64], start: int, end: int) -> float:
    return float(loss[end] - loss[start]) / (end - start)
