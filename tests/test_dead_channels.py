"""What a plan claims that dead channels are worth is what they are: without them a network computes the same.

A proof compares a pruned network with what its plan says. Here the plan itself is put to the test, on networks whose
dead channels are known.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit as pk
from dead_networks import SIZE, Builder, LoRA, RawConv, dead_keeps, raw
from networks import lively
from prunekit import surgery
from prunekit.errors import SurgeryError
from prunekit.plan import Fold, Keep, Plan
from prunekit.restoration.constants import Constants, constant_folds
from prunekit.surgery.execution.outputs import tensors_of


def without_dead(model: nn.Module, x: Tensor) -> tuple[nn.Module, Constants]:
    """The network without its dead channels, proven, and what was folded."""
    graph = surgery.trace(model, x)
    keeps = dead_keeps(model, graph)
    constants = constant_folds(model, graph, keeps)
    plan = Plan([*(Keep(name, index) for name, index in keeps.items()), *constants.folds])
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) <= 1e-10
    return small, constants


def gap(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    """The largest difference of any output, relative to its size."""
    with torch.no_grad():
        want, have = tensors_of(model(x)), tensors_of(small(x))
    assert want.keys() == have.keys()
    return max(float((want[k] - have[k]).abs().max() / want[k].abs().max().clamp_min(1e-9)) for k in want)


def check(seed: int) -> None:
    builder = Builder(seed)
    model = builder.build()
    x = torch.randn(3, 3, *(SIZE[builder.rank],) * builder.rank, dtype=torch.float64)
    small, constants = without_dead(model, torch.zeros_like(x[:2]))
    assert not constants.lost, builder.kinds
    assert gap(model, small, x) <= 1e-9, builder.kinds


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_networks_without_their_dead_channels(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("thousandth", range(10))
def test_a_thousand_networks_without_their_dead_channels(thousandth: int) -> None:
    for seed in range(100 * thousandth, 100 * (thousandth + 1)):
        check(seed)


class Reads(nn.Module):
    """Eight channels, every second one dead with a constant, read by what is given; batch norm behind if asked for."""

    def __init__(self, reader: nn.Module, outputs: int = 6, norm: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.reader, self.behind = reader, nn.BatchNorm2d(outputs) if norm else nn.Identity()
        lively(self)
        with torch.no_grad():
            self.norm.weight[::2] = 0.0
            self.norm.bias[::2] = torch.tensor([0.5, -0.25, 1.0, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.reader(torch.tanh(self.norm(self.conv(x))))).mean((2, 3))


class Called(nn.Module):
    """A layer of PyTorch's own whose weight alone is used, by a function call of its owner's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.layer.weight)


class OwnForward(nn.Conv2d):
    """A subclass that forgets its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class OwnConvForward(nn.Conv2d):
    """One that changes the inner method."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, None if bias is None else bias * 2)


class SharedBias(nn.Module):
    """A bias that another operation uses as well."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = raw(6, 8, 3, 3), raw(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.shift) * self.shift.reshape(1, -1, 1, 1)


class ComputedBias(SharedBias):
    """A bias that is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.shift.exp())


X = torch.randn(2, 3, 8, 8, dtype=torch.float64)
UNABLE = {
    "a function call": lambda: RawConv(2, 8, 6, 3, False),
    "a layer's weight alone": lambda: Called(nn.Conv2d(8, 6, 3)),
    "a layer's weight alone, without a bias": lambda: Called(nn.Conv2d(8, 6, 3, bias=False)),
    "a forward without its bias": lambda: OwnForward(8, 6, 3, bias=False),
    "a forward of its own": lambda: OwnConvForward(8, 6, 3, bias=False),
    "a bias for two": SharedBias,
    "a computed bias": ComputedBias,
    "a strided transposed convolution": lambda: nn.ConvTranspose2d(8, 6, 2, stride=2),
    "one with gaps": lambda: nn.ConvTranspose2d(8, 6, 1, stride=3),
    "low rank": lambda: LoRA(8, 6),
}


@pytest.mark.parametrize("name", UNABLE)
def test_no_fold_is_claimed_that_an_operation_cannot_carry(name: str) -> None:
    """The notes say what is lost; a fold written by hand is refused."""
    torch.manual_seed(0)
    model = Reads(UNABLE[name]())
    graph = surgery.trace(model, X)
    keeps = dead_keeps(model, graph)
    _, constants = without_dead(model, X)
    (reader, reason), *_ = constants.lost.items()
    assert reader not in {fold.consumer for fold in constants.folds}
    assert reason
    plan = Plan([*(Keep(n, i) for n, i in keeps.items()), Fold(reader, "conv", offset=torch.tensor([0.5, 0.0] * 4))])
    with pytest.raises(SurgeryError, match="cannot take over constants"):
        surgery.edit(model, plan, graph)
    pruned = pk.prune("slim", model, X, ratio=0.5)
    assert reader in pruned.plan.notes["constants_lost"]


@pytest.mark.parametrize("name", ["a layer's weight alone", "a forward of its own", "a forward without its bias"])
def test_a_batch_norm_behind_takes_constants_over(name: str) -> None:
    torch.manual_seed(0)
    model = Reads(UNABLE[name](), norm=True)
    small, constants = without_dead(model, X)
    assert not constants.lost
    assert gap(model, small, X) <= 1e-9


SHARED: dict[str, Any] = {
    "transposed, grouped": lambda: nn.ConvTranspose2d(8, 6, 3, padding=2, groups=2, bias=False),
    "transposed, dilated": lambda: nn.ConvTranspose2d(8, 6, 3, padding=4, dilation=2),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2, bias=False),
    "reflected borders": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("name", SHARED)
def test_constants_go_where_the_kernel_counts(name: str) -> None:
    torch.manual_seed(0)
    model = Reads(SHARED[name]())
    small, constants = without_dead(model, X)
    assert [fold.consumer for fold in constants.folds] == ["reader"]
    assert gap(model, small, X) <= 1e-9


def test_a_norm_that_two_layers_share_takes_nothing_over() -> None:
    """Its running mean would be shifted for the other layer as well."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Reads(OwnForward(8, 6, 3, bias=False)), OwnForward(3, 6, 3, bias=False)
            self.shared = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one.reader(torch.tanh(self.one.norm(self.one.conv(x))))
            return (self.shared(y) * self.shared(self.other(x))).mean((2, 3))

    model = lively(Net())
    with torch.no_grad():
        model.one.norm.weight[::2] = 0.0
        model.one.norm.bias[::2] = 0.5
    _, constants = without_dead(model, X)
    assert list(constants.lost) == ["one.reader"]


def test_an_output_that_is_returned_is_not_shifted_behind_its_back() -> None:
    class Net(Reads):
        def forward(self, x: Tensor) -> Any:
            y = self.reader(torch.tanh(self.norm(self.conv(x))))
            return y, self.behind(y)

    torch.manual_seed(0)
    model = Net(OwnForward(8, 6, 3, bias=False), norm=True)
    _, constants = without_dead(model, X)
    assert list(constants.lost) == ["reader"]


def test_a_shared_kernel_has_its_constants_in_every_bias() -> None:
    class Net(Reads):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(8, 6, 1))
            self.other = nn.Conv2d(8, 6, 1).double()
            self.other.weight = self.reader.weight

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.norm(self.conv(x)))
            return self.reader(y) * self.other(y)

    torch.manual_seed(0)
    model = Net()
    small, constants = without_dead(model, X)
    assert len(constants.folds) == 1
    assert gap(model, small, X) <= 1e-9


def test_a_norm_behind_two_layers_of_one_kernel_takes_each_constant_once() -> None:
    """One of them has a bias of its own besides."""

    class Net(Reads):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(8, 6, 1), norm=True)
            self.other = OwnForward(8, 6, 1, bias=False).double()
            self.other.weight = self.reader.weight

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.norm(self.conv(x)))
            return (self.behind(self.reader(y)) * self.behind(self.other(y))).mean((2, 3))

    torch.manual_seed(0)
    model = Net()
    small, constants = without_dead(model, X)
    assert not constants.lost
    assert gap(model, small, X) <= 1e-9


def test_constants_for_inputs_that_stay_are_refused() -> None:
    model = Reads(nn.Conv2d(8, 6, 1))
    graph = surgery.trace(model, X)
    plan = Plan([Keep("conv", [1, 3, 5, 7]), Fold("reader", "conv", offset=torch.ones(8))])
    with pytest.raises(SurgeryError, match="must be zero"):
        surgery.edit(model, plan, graph)


def test_the_proof_does_not_share_the_arithmetic_of_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults in what folds do to weights and biases are seen, whatever they are."""
    torch.manual_seed(0)
    model = Reads(nn.Conv2d(8, 6, 3, padding=1))
    graph = surgery.trace(model, X)
    keep = Keep("conv", [1, 3, 5, 7])
    module = importlib.import_module("prunekit.surgery.editing.compensation")
    shift, places = module.output_shift, module.places_of
    faults: list[tuple[str, Any, Fold]] = [
        ("output_shift", lambda *a: 1.1 * shift(*a), Fold("reader", "conv", offset=torch.tensor([0.5, 0.0] * 4))),
        ("places_of", lambda *a: places(*a)[::-1].copy(), Fold("reader", "conv", matrix=torch.randn(4, 4))),
    ]
    for name, faulty, fold in faults:
        plan = Plan([keep, fold])
        surgery.verify(model, surgery.edit(model, plan, graph), plan, graph)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, faulty)
            small = surgery.edit(model, plan, graph)
            with pytest.raises(SurgeryError, match="first in 'reader'"):
                surgery.verify(model, small, plan, graph)


def test_half_precision_is_proven_with_its_folds() -> None:
    """Folds are rounded to the weights' type; the proof is about what the plan says."""
    torch.manual_seed(0)
    model = Reads(nn.Conv2d(8, 6, 3)).to(torch.bfloat16)
    result = pk.prune("slim", model, X.to(torch.bfloat16), ratio=0.5)
    assert result.plan.folds
    assert result.difference <= 1e-4
    with torch.no_grad():
        result.model.reader.bias[0] *= 1.01
    with pytest.raises(SurgeryError, match="does not have the weights"):
        surgery.verify(model, result.model, result.plan, result.graph)


def test_every_kind_of_function_is_among_the_networks() -> None:
    kinds = {kind for seed in range(150) for kind in _kinds(seed)}
    assert len(kinds) == 28, sorted(kinds)


def _kinds(seed: int) -> list[str]:
    builder = Builder(seed)
    builder.build()
    return builder.kinds
