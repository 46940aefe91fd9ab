"""Pre-activation networks: a batch norm may lose channels of a stream that its other readers keep."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import prunekit as pk
from networks import lively
from prunekit import models, surgery
from prunekit.nn.channels import SelectedNorm
from prunekit.plan import Keep, Plan

X = torch.zeros(2, 3, 32, 32, dtype=torch.float64)


@pytest.fixture
def model() -> nn.Module:
    return lively(models.build("densenet40_12"))


def readers(model: nn.Module) -> list[str]:
    graph = surgery.trace(model, X)
    return [link.norm for link in graph.links]


def test_one_reader_loses_channels_and_the_stream_stays(model: nn.Module) -> None:
    name = readers(model)[1]
    width = model.get_submodule(name).num_features
    small = pk.apply(model, Plan([Keep(name, range(0, width, 2))]), X)
    selected = small.get_submodule(name)
    assert isinstance(selected, SelectedNorm)
    assert selected.norm.num_features == (width + 1) // 2
    assert selected.select.index.tolist() == list(range(0, width, 2))
    others = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert others == [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_a_selection_can_be_narrowed_and_its_stream_pruned_again(model: nn.Module) -> None:
    name = readers(model)[1]
    width = model.get_submodule(name).num_features
    small = pk.apply(model, Plan([Keep(name, range(0, width, 2))]), X)
    again = pk.apply(small, Plan([Keep(f"{name}.norm", range(1, (width + 1) // 2))]), X)
    assert isinstance(again.get_submodule(name), SelectedNorm)
    assert not any(isinstance(m, SelectedNorm) for m in again.get_submodule(name).norm.modules())
    assert again.get_submodule(name).select.index.tolist() == list(range(0, width, 2))[1:]
    graph = surgery.trace(again, X)
    stem = graph.groups[0]
    last = pk.apply(again, Plan([Keep(stem.name, [u for u in range(stem.size) if u not in (0, 4)])]), X)
    assert last.get_submodule(name).select.index.tolist()[0] == 1  # channel 2, after 0 has gone; 4 went too


def test_what_a_stream_loses_its_readers_lose(model: nn.Module) -> None:
    graph = surgery.trace(model, X)
    stem = graph.groups[0]
    small = pk.apply(model, Plan([Keep(stem.name, range(1, stem.size))]), X)
    before = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    after = [m.num_features for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(isinstance(m, SelectedNorm) for m in small.modules())
    assert sum(before) > sum(after)


@pytest.mark.parametrize("arch", ["preresnet164", "densenet40_12"])
def test_slim_prunes_readers_and_drops_what_nobody_reads(arch: str) -> None:
    model = lively(models.build(arch))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.01, 1)
    names = readers(model)
    with torch.no_grad():
        for name in names:  # nobody wants the stem's first channel
            if model.get_submodule(name).num_features >= 16:
                model.get_submodule(name).weight[0] = 0.0
    small, plan = pk.slim(model, X, ratio=0.4)
    assert any(isinstance(m, SelectedNorm) for m in small.modules())
    if arch == "densenet40_12":
        assert 0 not in next(keep.index for keep in plan.keeps if keep.group == surgery.trace(model, X).groups[0].name)


def test_selections_are_saved_and_loaded(model: nn.Module) -> None:
    model = models.build("densenet40_12")
    small, _ = pk.slim(model, ratio=0.3)
    buffer = io.BytesIO()
    pk.save(small, buffer)
    buffer.seek(0)
    again = pk.load(buffer)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), small(x))
