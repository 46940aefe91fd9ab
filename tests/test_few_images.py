"""Refits and selection by few images: neither takes what they show by chance for what there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunekit.restoration import second_moments
from prunekit.restoration.least_squares import Wanted, fit_towards


def few_rows(rows: int, noise: float, *, inputs: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the outputs that are wanted, and the weights behind them: `(1, inputs, rows)` and so on."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(1, 4, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(1, inputs, rows, generator=generator, dtype=torch.float64)
    return x, weight @ x + noise * torch.randn(1, 4, rows, generator=generator, dtype=torch.float64), weight


@pytest.mark.parametrize(("rows", "noise"), [(36, 3.0), (24, 3.0), (2000, 0.1)])
def test_the_ridge_is_chosen_by_rows_put_aside(rows: int, noise: float) -> None:
    """Few and noisy rows leave weights that are right nearly as they are; many replace those that are wrong."""
    x, y, true = few_rows(rows, noise)
    start = true + (0.1 if rows < 100 else 1.0)
    aside = torch.arange(rows) >= 0.75 * rows
    errors = {}
    for ridge in (None, 1e-2):
        fit = fit_towards(start, x, Wanted(y, aside=aside), ridge, constant=True)
        errors[ridge] = float((fit.weight - true).square().mean())
    if rows < 100:
        assert errors[None] < 0.5 * errors[1e-2]
    else:
        assert errors[None] == pytest.approx(errors[1e-2])


@pytest.mark.parametrize("rows", [120, 24], ids=["more rows than inputs", "fewer rows than inputs"])
def test_weights_that_no_fit_improves_stay(rows: int) -> None:
    """The weights are right, and what is wanted differs from what they give by noise alone."""
    x, y, true = few_rows(rows, 3.0)
    fit = fit_towards(true, x, Wanted(y, aside=torch.arange(rows) >= 0.75 * rows), constant=True)
    assert torch.allclose(fit.weight, true, atol=1e-4)


@pytest.mark.parametrize("rows", [300, 20], ids=["more rows than inputs", "fewer rows than inputs"])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_inputs_that_vary_by_rounding_alone_keep_their_weights(rows: int, level: float) -> None:
    """Otherwise weights grow that turn rounding into answers, and no two machines agree."""
    start = few_rows(rows, 0.0)[2]
    x = level + 1e-17 * torch.randn(1, 30, rows, dtype=torch.float64)
    fit = fit_towards(start, x, Wanted(torch.randn(1, 4, rows, dtype=torch.float64)), constant=True)
    assert torch.allclose(fit.weight, start, atol=1e-6)


def test_few_vectors_are_not_taken_for_all_that_there_are() -> None:
    """Of few vectors, some channels seem to tell all the others; of many, the covariance stays as it is."""
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randn(n, 40, generator=generator, dtype=torch.float64) for n in (30, 100_000))
    for values, part in ((few, 0.5), (many, 0.0)):
        plain = torch.cov(values.t(), correction=0)
        covariance = second_moments.shrunk(plain, len(values))
        assert torch.allclose(covariance.diagonal(), plain.diagonal())
        off = ~torch.eye(40, dtype=torch.bool)
        kept = float((covariance[off] * plain[off]).sum() / plain[off].square().sum())
        assert kept < part if part else kept < 0.2  # what is independent is told apart in both
    assert torch.linalg.eigvalsh(second_moments.shrunk(torch.cov(few.t()), 30)).min() > 0
    mixed = many @ torch.randn(40, 40, generator=generator, dtype=torch.float64)
    plain = torch.cov(mixed.t(), correction=0)
    assert torch.allclose(second_moments.shrunk(plain, len(mixed)), plain, rtol=1e-3, atol=1e-3 * float(plain.max()))
