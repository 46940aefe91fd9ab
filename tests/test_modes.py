"""The warning that a threshold cuts into the channels a network uses."""

from __future__ import annotations

import numpy as np
import pytest

from prunekit.methods.slim.gamma_histogram import main_mode_start, warning

RNG = np.random.default_rng(0)
DENSE = np.abs(RNG.normal(1.0, 0.15, 2000))
SPARSE = np.concatenate([np.abs(RNG.normal(0, 0.004, 1400)), np.abs(RNG.normal(0.4, 0.08, 600))])


def test_a_sparse_network_is_cut_between_its_modes() -> None:
    assert 0.1 < main_mode_start(SPARSE) < 0.4
    assert warning(SPARSE, float(np.quantile(SPARSE, 0.69))) is None
    assert "cuts into the main mode" in str(warning(SPARSE, float(np.quantile(SPARSE, 0.85))))


def test_a_network_without_sparsity_is_warned_about_early() -> None:
    assert warning(DENSE, float(np.quantile(DENSE, 0.005))) is None
    assert "--sparsity" in str(warning(DENSE, float(np.quantile(DENSE, 0.4))))


@pytest.mark.parametrize("gammas", [np.zeros(5), np.full(5, np.inf), np.ones(5), np.zeros(0)])
def test_degenerate_distributions(gammas: np.ndarray) -> None:
    assert np.isfinite(main_mode_start(gammas))
