"""Selection of the channels that stay, and of their number in each layer, by the loss that they leave unexplained.

Of the covariance `S` of all channels, a kept channel explains `s s^T / (S_ii + ridge)` with `s` its column: one step of
a pivoted Cholesky factorisation. What a layer then loses is `tr(gram S)` (`prunekit.restoration.second_moments`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from prunekit.restoration.second_moments import Reading

_RIDGE = 1e-3  # of the mean variance: below that, channels are alike
_BLOCK = 48  # steps between which a whole matrix stays as it is


def pivoted(reading: Reading) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return all units, each the one that explains most of what the consumers read once those before it are kept.

    Also, what is lost with the first `n` of them kept, as `losses` tells.
    """
    unexplained = _Unexplained(reading)
    order, found = [], [unexplained.loss()]
    for _ in range(len(reading.gram)):
        order.append(unexplained.keep(unexplained.best()))
        found.append(unexplained.loss())
    return np.array(order, dtype=np.int64), np.minimum.accumulate(np.array(found))


def losses(reading: Reading, order: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the relative loss with the first `n` units of `order` kept, for `n` from 0 to all: `(units + 1,)`."""
    unexplained = _Unexplained(reading)
    found = [unexplained.loss()]
    for unit in order:
        unexplained.keep(int(unit))
        found.append(unexplained.loss())
    return np.minimum.accumulate(np.array(found))


class _Unexplained:
    """The covariance `S` that the channels kept so far leave, written out every `_BLOCK` steps.

    With `c_j = s_j / sqrt(pivot_j)` for the channels kept since then, `S = S_0 - sum_j c_j c_j^T`, so that a column of
    `S` is one of `S_0` less a few of these vectors, and likewise for `G S` and `S_0 G S`, whose first values are known.
    What a channel would explain, `diag(S G S) / (diag(S) + ridge)`, is brought up to date from that one column.
    """

    def __init__(self, reading: Reading) -> None:
        start, gram = reading.covariance.detach().double(), reading.gram.detach().double()
        product = gram @ start
        # row u: column u of S_0, of G S_0, and of S_0 G S_0, one after the other
        self._start = torch.cat([start.t(), product.t(), (start @ product).t()], 1)
        self._steps = self._start.new_empty(_BLOCK, self._start.size(1))  # row j: c_j, G c_j and S_0 G c_j
        self._done = 0
        self._diagonal = start.diagonal().clone()
        self._gains = (start * product.t()).sum(1)  # diag(S G S)
        mean = self._diagonal.mean()
        self._ridge = float(_RIDGE * mean) if mean > 0 else 1.0
        self._kept: list[int] = []
        self._loss = float(product.diagonal().sum())

    def best(self) -> int:
        """Return the unit that lowers the loss most."""
        gains = self._gains / (self._diagonal.clamp_min(0) + self._ridge)
        gains[self._kept] = -torch.inf
        return int(gains.argmax())

    def keep(self, unit: int) -> int:
        """Take out what `unit` explains."""
        if self._done == _BLOCK:
            self._write_out()
        width, known = len(self._diagonal), self._steps[: self._done]
        columns = self._start[unit] - known[:, unit] @ known
        own, read, through = columns.reshape(3, width)  # column `unit` of S, of G S, and of S_0 G S
        pivot = own[unit].clamp_min(0) + self._ridge
        residual = through - (known[:, :width] @ read) @ known[:, :width]  # column `unit` of S G S
        worth = own @ read  # s^T G s
        self._gains += own * (own * (worth / pivot) - 2 * residual) / pivot
        self._diagonal -= own.square() / pivot
        self._loss -= float(worth / pivot)
        self._steps[self._done] = columns / pivot.sqrt()
        self._done += 1
        self._kept.append(unit)
        return unit

    def _write_out(self) -> None:
        """Make the present `S` the first one."""
        width = len(self._diagonal)
        steps = self._steps[:, :width].clone()
        self._start.addmm_(steps.t(), self._steps, alpha=-1)  # columns of S, of G S and of S_0 G S
        read = self._start[:, width : 2 * width] @ steps.t()  # (G S)^T c_j
        self._start[:, 2 * width :].addmm_(read, steps, alpha=-1)
        self._done = 0

    def loss(self) -> float:
        """Return `tr(gram S)`."""
        return max(0.0, self._loss)


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
