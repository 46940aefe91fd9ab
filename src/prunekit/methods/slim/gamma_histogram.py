"""Check a threshold against the distribution of batch-norm scales: is the network sparse enough?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BINS = 40
_LIVING = 0.05  # gammas below this share of the largest form the mode at zero that sparsity training makes
_FLANK = 0.25  # a mode ends where its density has fallen to this share of its peak


def main_mode_start(gammas: NDArray[np.float64]) -> float:
    """Return where the main mode of |gamma| begins, among the channels that sparsity training has left alive.

    After sparsity training there are two modes, one at zero and one of channels in use; without it there is one.
    """
    living = gammas[np.isfinite(gammas) & (gammas > _LIVING * gammas[np.isfinite(gammas)].max(initial=0.0))]
    if living.size < 2 or np.ptp(living) == 0:
        return float(living[0]) if living.size else 0.0
    counts, edges = np.histogram(living, bins=_BINS)
    density = np.convolve(counts, [0.25, 0.5, 0.25], mode="same")
    peak = int(density.argmax())
    thin = np.flatnonzero(density[:peak] < _FLANK * density[peak])
    return float(edges[thin[-1] + 1] if thin.size else edges[0])


def warning(gammas: NDArray[np.float64], threshold: float) -> str | None:
    """Return a warning where the threshold removes channels that the network uses, otherwise None."""
    start = main_mode_start(gammas)
    if threshold <= start:
        return None
    return (
        f"the threshold {threshold:.3g} cuts into the main mode of the gammas, which begins at {start:.3g}: the "
        "network is not sparse enough for this; train it with --sparsity, remove less, or tune with --data and --epochs"
    )
