"""Every way of restoration on generated networks: finite, proven, and on average nearer to the original than pruning.

Thirty networks run with every test session, always the same; three hundred with `-m slow`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
from networks import random_network
from prunekit import surgery
from prunekit.restoration import norm_alignment, synthetic

WAYS = ("paper", "moments", "synthetic", "calibrate", "default")
REFUSALS: list[pk.InputError] = []


def network_and_images(seed: int) -> tuple[nn.Module, Tensor]:
    """A network whose batch norms hold the statistics of smooth images, and 120 of them."""
    model = random_network(seed)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(120, 3, 4, 4, generator=generator, dtype=torch.float64)
    images = nn.functional.interpolate(coarse, (8, 8), mode="bilinear")
    images += 0.1 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return norm_alignment.aligned(model, surgery.trace(model, images[:2]), images), images


def error_of(model: nn.Module, images: Tensor, way: str) -> float | None:
    """The squared error of a restored network's outputs on images that no way has seen; None where it is refused."""
    calibration, measured = images.split(80)
    settings: dict[str, Any] = {"restore": None if way == "default" else way}
    if way == "calibrate":
        settings["images"] = calibration
    try:
        result = pk.prune("merge", model, images[:2], ratio=0.4, **settings)
    except pk.InputError as refusal:  # a network without batch norm, say
        REFUSALS.append(refusal)
        return None
    assert result.difference is not None
    assert result.difference < 1e-6
    assert all(bool(torch.isfinite(value).all()) for value in result.model.state_dict().values())
    with torch.no_grad():
        return float((result.model(measured) - model(measured)).square().mean())


def compare(seeds: range) -> dict[str, list[float]]:
    """For each way, the logarithms of its error relative to that of pruning alone."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    REFUSALS.clear()
    for seed in seeds:
        model, images = network_and_images(seed)
        plain = error_of(model, images, "none")
        for way in WAYS:
            error = error_of(model, images, way)
            if error is not None and plain:
                found[way].append(math.log10(max(error, 1e-30) / plain))
    assert all(refusal.hint for refusal in REFUSALS)
    return found


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "COUNT", 60)


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("start", range(0, 30, 3))
def test_restored_networks_are_finite_and_proven_and_nearer(start: int) -> None:
    found = compare(range(start, start + 3))
    together = [ratio for ratios in found.values() for ratio in ratios]
    assert sum(together) / len(together) < 0


@pytest.mark.usefixtures("few_images")
def test_inputs_that_vary_by_rounding_alone_are_not_fitted() -> None:
    """Here a gate reads the mean of a group norm of single channels, which is zero but for rounding."""
    found = compare(range(206, 207))
    assert len(found["calibrate"]) == len(found["synthetic"]) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("few_images")
def test_three_hundred_networks_come_nearer_by_every_way() -> None:
    for way, ratios in compare(range(300)).items():
        assert len(ratios) > 100, way
        assert sum(ratios) / len(ratios) < 0, way
