"""ManiDP's informed start: an order of channels from the network itself, and layers refitted to closed gates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
from networks import lively
from prunekit.errors import InputError
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.fit import add_gates, fit
from prunekit.methods.manidp.informed_start import answers_moved, inform
from prunekit.methods.manidp.keep_ratios import shares
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import gated_layers
from prunekit.training.config import TrainConfig


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


def gated(name: str) -> nn.Module:
    width: dict[str, Any] = {} if name.startswith("torchvision") else {"arch_args": {"width": 0.5}}
    return add_gates(lively(pk.load(name, **width)), GateRecipe()).eval()


def answers(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("name", ["prunekit:resnet20", "prunekit:vgg11_cifar", "torchvision:mobilenet_v2"])
def test_nothing_closed_changes_nothing(name: str) -> None:
    model, images = gated(name), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    before = answers(model, images)
    inform(GatedView.of(model), images, keep=1.0)
    assert not torch.equal(next(layer for _, layer in gated_layers(model)).gate.excite.bias, torch.ones(()))
    assert (answers(model, images) - before).abs().max() <= 1e-9 * before.abs().max()


@pytest.mark.parametrize("name", ["prunekit:resnet20", "prunekit:vgg11_cifar"])
def test_refitted_layers_make_up_for_closed_gates(name: str) -> None:
    images, others = torch.randn(2, 40, 3, 32, 32, dtype=torch.float64)
    model = gated(name)
    wanted = answers(model, others)
    inform(GatedView.of(model), images, keep=0.6)
    unfitted = copy.deepcopy(model)
    fresh = dict(gated(name).named_parameters())
    for key, parameter in unfitted.named_parameters():
        if key.endswith("weight") and ".gate." not in key and ".norm." not in key:
            parameter.data.copy_(fresh[key].data)

    def error(candidate: nn.Module) -> float:
        return float((answers(candidate, others) - wanted).norm() / (wanted - wanted.mean(0)).norm())

    assert error(model) < 0.8 * error(unfitted)


def test_every_image_keeps_the_most_moving_channels() -> None:
    model, images = gated("prunekit:resnet20"), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    strengths = answers_moved(model, images)
    kept_shares = inform(GatedView.of(model), images, keep=0.5)
    for name, layer in gated_layers(model):
        kept = layer.kept(layer.gate(torch.rand(4, layer.gate.squeeze.in_features, 5, 5, dtype=torch.float64))) > 0
        assert kept.sum(1).tolist() == [round(kept_shares[name] * kept.size(1))] * 4
        if kept_shares[name] < 1:
            assert strengths[name][kept[0]].min() >= strengths[name][~kept[0]].max()


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_shares_cost_what_the_uniform_share_does(keep: float) -> None:
    model = gated("prunekit:resnet20")
    cost = GatedView.of(model).cost
    strengths = {name: torch.rand(width) ** 2 for name, width in zip(cost.layers, cost.channels, strict=True)}
    loud = cost.layers[3]
    strengths[loud] += 100
    found = shares(strengths, cost, keep)
    widths = torch.tensor([cost.channels]).double()
    chosen = float(cost.macs(widths * torch.tensor([list(found.values())]).double()))
    assert 0.97 * float(cost.macs(widths * keep)) <= chosen <= float(cost.macs(widths * keep))
    assert found[loud] == 1
    assert min(found.values()) >= 0.25


def test_hard_images_keep_more() -> None:
    contrast = torch.linspace(0.2, 3, 40, dtype=torch.float64)[:, None, None, None]
    model, images = gated("prunekit:resnet20"), contrast * torch.randn(40, 3, 32, 32, dtype=torch.float64)
    hardness = torch.distributions.Categorical(logits=answers(model, images)).entropy().log()
    read: list[Tensor] = []
    hooks = [g.gate.register_forward_pre_hook(lambda _, x: read.append(x[0])) for _, g in gated_layers(model)]
    answers(model, images)
    for hook in hooks:
        hook.remove()
    kept_shares = inform(GatedView.of(model), images, keep=0.5, ease=3.0)
    for (name, layer), x in zip(gated_layers(model), read, strict=True):
        rows = layer.gate.excite.weight
        assert torch.equal(rows, rows[:1].expand_as(rows))  # the order of the channels stays
        with torch.no_grad():
            mean, kept = layer.gate(x).mean(1), (layer.kept(layer.gate(x)) > 0).double().mean()
        assert torch.corrcoef(torch.stack([mean, hardness]))[0, 1] > 0.5
        assert kept == pytest.approx(kept_shares[name], abs=0.03)


def test_how_far_answers_move() -> None:
    """Against finite differences: the expected square over directions is the squared norm of the slope."""
    model, images = gated("prunekit:resnet20"), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    name, layer = next(iter(gated_layers(model)))
    step, slopes = 1e-6, []
    before = answers(model, images)
    for channel in range(len(layer.gate.excite.bias)):
        with torch.no_grad():
            layer.gate.excite.bias[channel] += step
            slopes.append(((answers(model, images) - before) / step).square().sum())
            layer.gate.excite.bias[channel] -= step
    found = torch.stack([answers_moved(model, images, seed)[name] for seed in range(8)]).mean(0) / 4
    assert torch.corrcoef(torch.stack([found, torch.stack(slopes)]))[0, 1] > 0.95


def test_training_starts_from_it() -> None:
    data = pk.open_data("digits", "train").sample(256)
    model = pk.load("prunekit:resnet20", arch_args={"in_channels": 1})
    recipe = GateRecipe(keep=0.5, start="informed", ease=0.0)
    network = add_gates(model, recipe)
    result = fit(network, recipe, TrainConfig(epochs=1, batch_size=64, lr=0.01), data)
    cost = GatedView.of(network).cost
    uniform = float(cost.macs(torch.tensor([cost.channels]) * 0.5)) / cost.dense
    assert result.history[-1].figures["macs"] == pytest.approx(uniform, rel=0.05)


def test_unknown_starts_are_refused() -> None:
    with pytest.raises(InputError, match="informed"):
        GateRecipe(start="inform")
