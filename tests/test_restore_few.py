"""Restoring from a handful of images: views of them, among made ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import prunekit as pk
from prunekit import surgery
from prunekit.errors import InputError
from prunekit.restoration import synthetic
from prunekit.restoration.dead_leaves import dead_leaves
from prunekit.restoration.norm_alignment import aligned

X = torch.zeros(1, 3, 12, 12)
PLAN = pk.Plan([pk.Keep("0", range(6))])


def pictures(count: int, seed: int = 7) -> Tensor:
    """Natural enough, and of another brightness than what is made."""
    return 0.8 * dead_leaves(count, (3, 12, 12), torch.Generator().manual_seed(seed)) + 0.3


def network() -> nn.Module:
    """Its statistics are those of such pictures."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    return aligned(model.eval(), surgery.trace(model, X), pictures(500))


def error(model: nn.Module, plan: pk.Plan) -> float:
    """Of others than were restored from."""
    unseen = pictures(100, seed=11)
    with torch.no_grad():
        return float((pk.apply(model, plan, X)(unseen) - model(unseen)).square().mean())


@pytest.mark.parametrize("count", [1, 2])
def test_a_few_images_restore_further_among_made_ones(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "COUNT", 100)
    model, images = network(), pictures(count)
    few, alone = (pk.restore(model, PLAN, X, images=images, way=way) for way in ("few", "calibrate"))
    assert error(model, few) < error(model, alone)
    assert error(model, few) < error(model, PLAN)
    assert few.notes["few"]["images"] == 100
    assert few.notes["restore"] == "few"


@given(st.integers(1, 60), st.integers(2, 40), st.integers(0, 2**31), st.sampled_from([1, 3]))
def test_all_given_images_are_there_beside_views_that_stay_within_them(
    count: int, wanted: int, seed: int, channels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, channels, 8, 8, generator=generator)
    views = synthetic._views(images, max(count, wanted), generator)
    assert torch.equal(views[:count], images)
    assert len(views) == max(count, wanted)
    assert float(views.abs().max()) <= float(images.abs().max()) + 1e-6  # a mean of two, or what a shift lets in: 0
    copies = (views[count:, None] == images[None]).flatten(2).all(2).any(1)
    assert len(copies) < 20 or not bool(copies.all())


def test_calibrate_says_where_few_goes_further() -> None:
    model = network()

    def warning(count: int, model: nn.Module = model) -> Any:
        return pk.restore(model, PLAN, X, images=pictures(count)).notes.get("warning", "")

    assert "few images (100): --restore few" in warning(100)
    assert "--restore few" not in warning(101)
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    assert "--restore few" not in warning(5, plain)  # no statistics, nothing to make images from


def test_what_few_cannot_do_is_said() -> None:
    with pytest.raises(InputError, match="--restore few needs images"):
        pk.restore(network(), PLAN, X, way="few")
    with pytest.raises(InputError, match="up to 100 images, and these are 101") as caught:
        pk.restore(network(), PLAN, X, images=pictures(101), way="few")
    assert "--calibration 100" in str(caught.value.hint)
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    with pytest.raises(InputError, match="statistics"):
        pk.restore(plain, PLAN, X, images=pictures(5), way="few")
