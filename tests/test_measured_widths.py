"""Widths by measured losses: what the outputs lose with one layer narrowed, and what budgets make of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import prunekit as pk
from networks import lively
from prunekit import surgery
from prunekit.errors import InputError
from prunekit.methods.merge.measuring import through
from prunekit.nn.skipped import SkippedBlock
from prunekit.restoration.narrowed_alone import NarrowedAlone
from prunekit.surgery.graph.blocks import residual_blocks


class TwoBranches(nn.Module):
    """Two branches alike in all but what the head makes of them."""

    def __init__(self, importance: float) -> None:
        super().__init__()
        self.strong, self.weak = (
            nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))
            for _ in range(2)
        )
        self.head = nn.Conv2d(8, 5, 1)
        self.importance = importance

    def forward(self, x: Tensor) -> Tensor:
        parts = self.strong(x), self.weak(x) * self.importance
        return self.head(torch.cat(parts, dim=1))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(importance: float = 0.05) -> nn.Module:
    torch.manual_seed(1)
    return lively(TwoBranches(importance)).eval()


def widths(pruned: pk.Pruned) -> dict[str, int]:
    whole = {group.name: group.size for group in pruned.graph.groups}
    return whole | {keep.group: len(keep.index) for keep in pruned.plan.keeps}


def test_what_reaches_the_outputs_decides(images: Tensor) -> None:
    """What is foreseen ends at the layer behind, where both branches lose alike."""
    model = network()
    found = {
        way: widths(pk.prune("merge", model, images[:1], images=images, widths=way, target_macs="60%"))
        for way in ("loss", "measured")
    }
    assert found["measured"]["strong.0"] > 2 * found["measured"]["weak.0"]
    assert found["loss"]["strong.0"] < 2 * found["loss"]["weak.0"]


def test_losses_are_those_of_the_network_that_is_refitted_and_run(images: Tensor) -> None:
    """The refit is done here again, by least squares on the patches that the layer reads."""
    model = network(1.0)
    graph = surgery.trace(model, images[:1])
    fitted, measured = images[::2], images[1::2]
    layer = model.get_submodule("strong.3")
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    with torch.no_grad():
        inputs = model.strong[:3](fitted)
        kept = inputs.var((0, 2, 3)).argsort()[-8:].sort().values.tolist()  # units that hardly vary ask for a ridge
        patches = nn.functional.unfold(inputs[:, kept], 3, padding=1).movedim(1, -1).flatten(0, 1)
        wanted = layer(inputs).flatten(2).movedim(1, -1).flatten(0, 1)
        ones = torch.ones(len(patches), 1, dtype=patches.dtype)
        solved = torch.linalg.lstsq(torch.cat([patches, ones], 1), wanted).solution
        whole = model(measured)
        weight, bias = layer.weight.clone(), layer.bias.clone()
        layer.weight.zero_()
        layer.weight[:, kept] = solved[:-1].t().reshape(4, len(kept), 3, 3)
        layer.bias.copy_(solved[-1])
        now = model(measured)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    expected = float((now - whole).square().sum() / (whole - whole.mean(0)).square().sum())
    assert expected > 0.01
    alone = NarrowedAlone(model, graph, images)
    group = graph.group("strong.0")
    assert alone.loss(alone.network(group, kept)) == pytest.approx(expected, rel=0.1)
    assert alone.loss(alone.network(group, range(16))) < 1e-9


def test_another_budget_measures_nothing_again(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, original = list[Any](), NarrowedAlone.network

    def network_of(self: NarrowedAlone, group: surgery.ChannelGroup, kept: Sequence[int]) -> nn.Module:
        counted.append((group.name, kept))
        return original(self, group, kept)

    monkeypatch.setattr(NarrowedAlone, "network", network_of)
    model = network()
    first = pk.prune("merge", model, images[:1], images=images, widths="measured", target_macs="60%")
    assert len(counted) == 10  # two layers at three widths, two of four channels at two
    again = pk.prune("merge", model, images[:1], images=images, widths="measured", target_macs="40%", graph=first.graph)
    assert len(counted) == 10
    assert again.after.macs <= 0.4 * again.before.macs < first.after.macs
    pk.prune("merge", model, images[:1], images=images[8:], widths="measured", target_macs="40%", graph=first.graph)
    assert len(counted) == 20  # other images
    fresh = pk.prune("merge", model, images[:1], images=images, widths="measured", target_macs="40%")
    assert widths(fresh) == widths(again)


def test_measuring_takes_images() -> None:
    with pytest.raises(InputError, match="runs the network on images") as refusal:
        pk.prune("merge", network(), torch.zeros(1, 3, 8, 8).double(), widths="measured", ratio=0.5)
    assert "--data" in str(refusal.value.hint)


def test_layers_of_which_nothing_is_foreseen_are_measured(images: Tensor) -> None:
    """A grouped convolution reads these channels, and is pruned plainly; its loss shows all the same."""
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 4, 1)]
    model = lively(nn.Sequential(*layers))
    done = pk.prune("merge", model, images[:1], images=images, widths="measured", target_macs="50%", scope="all")
    assert done.after.macs <= 0.5 * done.before.macs
    assert done.plan.notes["widths"] == "measured"


@given(
    steps=st.lists(st.floats(0, 1), min_size=3, max_size=20),
    losses=st.lists(st.floats(0, 10), min_size=1, max_size=3),
    data=st.data(),
)
def test_curves_pass_through_what_was_measured_and_fall(
    steps: list[float], losses: list[float], data: st.DataObject
) -> None:
    foreseen = np.append(np.cumsum(steps)[::-1], 0.0)
    places = data.draw(
        st.lists(st.integers(1, len(steps) - 1), min_size=len(losses), max_size=len(losses), unique=True)
        if len(losses) < len(steps)
        else st.just([1])
    )
    known = dict(zip(sorted(places), sorted(losses, reverse=True), strict=False))
    curve = through(foreseen, known)
    assert curve.shape == foreseen.shape
    assert (np.diff(curve) <= 0).all()
    assert curve[-1] == 0
    for width, loss in known.items():
        assert curve[width] == pytest.approx(loss, rel=1e-3, abs=1e-9)


def _residual(seed: int = 3) -> nn.Module:
    """Three residual blocks, of which the second adds next to nothing to the stream."""
    torch.manual_seed(seed)
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(Block() for _ in range(3)), Head()))
    with torch.no_grad():
        model[2].second.weight.mul_(0.02)
    return model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def test_a_block_that_hardly_matters_goes_first(images: Tensor) -> None:
    model = _residual()
    done = pk.prune("merge", model, images[:1], images=images, widths="measured", target_macs="68%")
    assert done.plan.notes["blocks"] == ["2"]
    assert isinstance(done.model[2], SkippedBlock)
    assert widths(done)["2.first"] == 0
    assert done.difference < 1e-9
    assert done.after.macs <= 0.68 * done.before.macs
    without = pk.prune("merge", model, images[:1], images=images, widths="loss", target_macs="68%")
    assert "blocks" not in without.plan.notes
    with torch.no_grad():
        errors = [float((p.model(images) - model(images)).square().mean()) for p in (done, without)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("settings", [{"skip": ("2.*",)}, {"widths": "uniform"}, {"restore": "none"}])
def test_blocks_stay_where_nothing_makes_up_for_them(images: Tensor, settings: dict[str, Any]) -> None:
    chosen = {"widths": "measured", **settings}
    done = pk.prune("merge", _residual(), images[:1], images=images, target_macs="80%", **chosen)
    assert "blocks" not in done.plan.notes


@pytest.mark.parametrize(
    ("settings", "allowed"), [({"round_to": 4}, {0, 4, 8}), ({"min_channels": 5}, {0, *range(5, 12)})]
)
def test_widths_beside_blocks_that_go_are_rounded_as_ever(
    images: Tensor, settings: dict[str, Any], allowed: set[int]
) -> None:
    done = pk.prune("merge", _residual(), images[:1], images=images, widths="measured", target_macs="45%", **settings)
    assert "2.first" in {keep.group for keep in done.plan.keeps if not keep.index}
    assert {len(keep.index) for keep in done.plan.keeps} <= allowed


def test_losses_without_a_block_are_those_of_the_network_that_is_run(images: Tensor) -> None:
    """What its branch gave on average stays; of the layers behind it, as many as it had are refitted."""
    model = _residual()
    graph = surgery.trace(model, images[:1])
    block = residual_blocks(graph)[1]
    alone = NarrowedAlone(model, graph, images)
    network = alone.without(block)
    kept = {name for name, values in network.named_parameters() if name in dict(model.named_parameters())}
    changed = {n for n in kept if not torch.equal(network.get_parameter(n), model.get_parameter(n))}
    assert {name.rpartition(".")[0] for name in changed} == {"3.first", "3.second"}
    measured = images[1::2]
    with torch.no_grad():
        now, was = network(measured), model(measured)
    share = float((now - was).square().sum() / (was - was.mean(0)).square().sum())
    assert alone.loss(network) == pytest.approx(share, rel=1e-9)
