"""Hooks and thresholds that something needs for a while are as before afterwards, whatever fails in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import prunekit as pk
from prunekit.data import ImageSet, open_data
from prunekit.exporting.parity import hangs_on_rounding
from prunekit.methods.manidp.budgets import calibrate
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.difficulty import foresee
from prunekit.methods.manidp.fit import add_gates
from prunekit.methods.manidp.gate_report import portray
from prunekit.methods.manidp.informed_start import inform
from prunekit.methods.manidp.record import observe
from prunekit.methods.manidp.runtimes.gather import OneImage, gathered, tune
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import gated_layers, same_thresholds
from prunekit.spec import origin_of, remember
from prunekit.surgery.execution.hooks import hooked, running

PIXELS = torch.rand(128, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Failing(nn.Flatten):
    """Fails in the forward with values that `forwards` counts down to."""

    forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards -= not x.is_meta
        if self.forwards == 0 and not x.is_meta:
            raise ZeroDivisionError
        return super().forward(x)


def fail(model: nn.Module, forward: int) -> None:
    """Let a forward fail, the first counted as 1."""
    next(module for module in model.modules() if isinstance(module, Failing)).forwards = forward


@pytest.fixture
def gated() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), Failing(), nn.Linear(48, 10),
    )  # fmt: skip
    origin = origin_of(pk.load("prunekit:vgg_digits"))
    assert origin is not None
    return add_gates(remember(model.eval(), replace(origin, arch="")), GateRecipe())


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def thresholds_of(model: nn.Module) -> list[float]:
    return [float(layer.threshold) for _, layer in gated_layers(model)]


def test_hooks_go_with_the_block() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    with contextlib.suppress(ZeroDivisionError), hooked(m.register_forward_hook(print) for m in model):
        assert hooks_of(model) == 2
        raise ZeroDivisionError
    assert hooks_of(model) == 0


def test_hooks_go_where_another_cannot_be_registered() -> None:
    model = nn.Sequential(nn.ReLU())

    def handles() -> Iterator[RemovableHandle]:
        yield model[0].register_forward_hook(print)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hooked(handles()):
        pytest.fail("never reached")
    assert hooks_of(model) == 0


def test_what_runs_is_known_where_it_fails() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(Failing()))
    fail(model, 1)
    with running(dict(model.named_modules())) as names:
        with pytest.raises(ZeroDivisionError):
            model(PIXELS)
        assert names == ["", "1", "1.0"]
    assert hooks_of(model) == 0


USES: dict[str, Callable[[nn.Module], object]] = {
    "informed start": lambda model: inform(GatedView.of(model), PIXELS, keep=0.5),
    "difficulty": lambda model: foresee(model, PIXELS, 1.0),
    "record": lambda model: observe(GatedView.of(model), [(PIXELS, None)] * 3),
    "rounding": lambda model: [hangs_on_rounding(model, PIXELS, 0.1) for _ in range(3)],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("forward", [1, 2])
def test_no_hook_is_left_where_a_forward_fails(use: str, forward: int, gated: nn.Module) -> None:
    fail(gated, forward)
    with pytest.raises(ZeroDivisionError):
        USES[use](gated)
    assert hooks_of(gated) == 0


def test_no_hook_is_left_where_a_runtime_cannot_be_timed(gated: nn.Module) -> None:
    runner = gathered(GatedView.of(gated), PIXELS[:1])
    assert isinstance(runner, OneImage)
    fail(runner, 1)
    with pytest.raises(ZeroDivisionError):
        tune(runner, PIXELS[:1])
    assert hooks_of(runner) == 0


@pytest.fixture
def images() -> ImageSet:
    return open_data("digits", "val")


@pytest.mark.parametrize("forward", [2, 4, 6])
def test_thresholds_are_put_back_where_a_report_fails(forward: int, gated: nn.Module, images: ImageSet) -> None:
    view = GatedView.of(gated)
    for _, layer in gated_layers(gated):
        layer.threshold.fill_(0.5)
    fail(gated, forward)
    with pytest.raises(ZeroDivisionError):
        portray(view, images)
    assert thresholds_of(gated) == [0.5] * len(thresholds_of(gated))
    assert hooks_of(gated) == 0


def test_thresholds_are_put_back_where_a_calibration_fails(gated: nn.Module) -> None:
    view = GatedView.of(gated)
    before = thresholds_of(gated)
    fail(gated, 3)
    with pytest.raises(ZeroDivisionError):
        calibrate(view, lambda: [(PIXELS, None)], 0.5 * view.cost.dense, "half")
    assert thresholds_of(gated) == before


def test_thresholds_are_those_from_before(gated: nn.Module) -> None:
    layers = [layer for _, layer in gated_layers(gated)]
    with contextlib.suppress(ZeroDivisionError), same_thresholds(layers):
        layers[0].threshold.fill_(7)
        raise ZeroDivisionError
    assert 7 not in thresholds_of(gated)
