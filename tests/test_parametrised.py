"""Weights that are computed from others: pruned through where it commutes, and plain parameters where it does not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import prunekit as pk
from prunekit import models
from prunekit.errors import InputError
from prunekit.plan import Fold, Keep, Plan
from prunekit.surgery import edit, materialised, resolve, trace
from prunekit.surgery.copying import named_tensors
from prunekit.surgery.editing.reparametrised import close

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LAYERS = ("0", "3", "5", "9")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 10, 2, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 4),
    )
    nn.init.uniform_(model[1].weight, 0.2, 1)
    nn.init.normal_(model[1].bias)
    return model.eval()


def each(model: nn.Module, change: Callable[[nn.Module, int], object]) -> nn.Module:
    for number, name in enumerate(LAYERS):
        change(model.get_submodule(name), number)
    return model


class LowRank(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(weight.size(0), 2))
        self.b = nn.Parameter(torch.randn(2, weight.size(1)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.a @ self.b).reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


class Masked(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand_like(weight) > 0.3).float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight


class Standardised(nn.Module):
    """Weight standardisation over the inputs: does not commute with cutting them, and has no inverse."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(1, keepdim=True)


def register(*kinds: Callable[[Tensor], nn.Module]) -> Callable[[nn.Module, int], None]:
    def change(layer: nn.Module, _: int) -> None:
        for kind in kinds:
            parametrize.register_parametrization(layer, "weight", kind(layer.weight.detach()))

    return change


def two_masks(layer: nn.Module, _: int) -> None:
    prune.l1_unstructured(layer, "weight", 0.4)
    prune.random_unstructured(layer, "weight", 0.3)
    if layer.bias is not None:
        prune.l1_unstructured(layer, "bias", 0.3)


def scaled_magnitudes(layer: nn.Module, _: int) -> None:
    weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(-1.7)  # magnitudes need not be lengths


def dead_inputs(layer: nn.Module, _: int) -> None:
    """Nothing is left of some directions once channels are cut."""
    weight_norm(layer)
    with torch.no_grad():
        layer.weight_v[1] = 0
        layer.weight_v[1].flatten()[-1] = 1


DIMENSIONS: list[Any] = [1, 1, None, 1]  # torch takes None for the whole, its types do not
STAY: dict[str, Callable[[nn.Module, int], object]] = {
    "masks": two_masks,
    "structured masks": lambda layer, _: prune.ln_structured(layer, "weight", 0.3, 2, 0),
    "old weight norm": lambda layer, _: weight_norm(layer),
    "old weight norm over other dimensions": lambda layer, n: weight_norm(layer, dim=DIMENSIONS[n]),
    "old weight norm, other magnitudes": scaled_magnitudes,
    "old weight norm, dead inputs": dead_inputs,
    "weight norm": lambda layer, _: parametrizations.weight_norm(layer),
    "weight norm over other dimensions": lambda layer, n: parametrizations.weight_norm(layer, dim=DIMENSIONS[n]),
    "weight norm of the bias": lambda layer, _: layer.bias is None or parametrizations.weight_norm(layer, "bias"),
    "low rank": register(LowRank),
    "mask, then square": register(Masked, lambda _: Squared()),
    "mask on a direction": lambda layer, _: prune.l1_unstructured(
        parametrizations.weight_norm(layer).parametrizations.weight, "original1", 0.3
    ),
}
GO: dict[str, Callable[[nn.Module, int], object]] = {
    "old spectral norm": lambda layer, _: spectral_norm(layer),
    "spectral norm": lambda layer, _: parametrizations.spectral_norm(layer),
    "standardised": register(lambda _: Standardised()),
    "mask on an old direction": lambda layer, _: prune.l1_unstructured(weight_norm(layer), "weight_v", 0.3),
}


def plan_of(model: nn.Module) -> Plan:
    """Some of every group that can go."""
    graph = trace(materialised(model), X)
    return Plan(Keep(group.name, range(1, group.size - 1)) for group in graph.groups if len(group.free) == group.size)


def check(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """The weights that the result computes are those that the plan leaves of what the original computes."""
    plain = materialised(model)
    want = named_tensors(edit(plain, plan, trace(plain, X)))
    have = named_tensors(materialised(small))
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert close(have[name], tensor), name


@pytest.mark.parametrize("kind", STAY)
def test_what_commutes_is_pruned_through(kind: str) -> None:
    model = each(net(), STAY[kind])
    before, output = copy.deepcopy(model.state_dict()), model(X).detach()
    plan = plan_of(model)
    small = pk.apply(model, plan, X)
    assert len(plan.keeps) >= 3
    assert list(small.state_dict()) == list(before)
    assert {name: p.requires_grad for name, p in small.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    check(model, small, plan)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(X), output)
    assert pk.verify(model, small, plan, X) < 1e-4
    small.train()(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("kind", GO)
def test_what_does_not_commute_becomes_plain(kind: str) -> None:
    model = each(net(), GO[kind])
    plan = plan_of(model)
    with pytest.warns(UserWarning, match=r"plain weights now.*3\.weight \(\w+\)"):
        small = pk.apply(model, plan, X)
    check(model, small, plan)
    assert type(small[3]) is nn.Conv2d
    assert isinstance(small[3].weight, nn.Parameter)
    assert not small[3]._forward_pre_hooks


@pytest.mark.parametrize("kind", ["old spectral norm", "spectral norm", "standardised"])
def test_what_is_not_cut_stays_as_it_is(kind: str) -> None:
    model = net()
    GO[kind](model[9], 0)
    small = pk.apply(model, Plan([Keep("0", range(8))]), X)
    assert list(small[9].state_dict()) == list(model[9].state_dict())
    assert list(map(type, small[9]._state_dict_hooks.values())) == list(map(type, model[9]._state_dict_hooks.values()))
    small.load_state_dict(small.state_dict())
    small.train()(X)  # the state of a spectral norm changes with every step
    assert torch.equal(model(X), model(X))


@pytest.mark.parametrize("kind", ["old spectral norm", "spectral norm"])
@pytest.mark.filterwarnings("ignore:plain weights now")
def test_a_network_in_training_is_left_as_it_is(kind: str) -> None:
    """Spectral norms change their state whenever they are asked in training mode."""
    model = each(net(), GO[kind]).train()
    before = copy.deepcopy(model.state_dict())
    small = pk.apply(model, Plan([Keep("0", range(8))]), X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in small.modules())


@pytest.mark.parametrize("kind", ["masks", "old weight norm", "weight norm", "low rank"])
def test_folds_go_into_what_computes_the_weight(kind: str) -> None:
    """A merge gives weights other directions, and puts values in masked places."""
    model = each(net(), STAY[kind])
    plain = materialised(model)
    graph = trace(plain, X)
    matrix = torch.zeros(8, 8)
    matrix[:, ::2] = 0.3
    plan = Plan([Keep("0", range(8)), Fold("3", "0", matrix)])
    if kind == "low rank":
        with pytest.warns(UserWarning, match="plain weights"):
            small = pk.apply(model, plan, X)
    else:
        small = pk.apply(model, plan, X)
        assert list(small.state_dict()) == list(model.state_dict())
    check(model, small, plan)
    assert not resolve(graph, plan).kept.all()


@pytest.mark.parametrize("kind", ["masks", "old weight norm", "weight norm"])
def test_methods_prune_again_and_again(kind: str) -> None:
    model = each(net(), STAY[kind])
    for _ in range(2):
        result = pk.prune("slim", model, X, ratio=0.3)
        assert result.after.params < result.before.params
        assert "plain_weights" not in result.plan.notes
        model = result.model


def test_the_plan_notes_what_became_plain() -> None:
    model = each(net(), GO["spectral norm"])
    with pytest.warns(UserWarning, match="plain weights now"):
        result = pk.prune("slim", model, X, ratio=0.3)
    assert "0.weight (SpectralNorm)" in result.plan.notes["plain_weights"]


def test_originals_that_two_weights_share_are_not_cut_twice() -> None:
    model = net()
    model[5] = nn.Conv2d(12, 12, 1)
    model[7] = nn.Sequential(nn.Conv2d(12, 12, 1), nn.AdaptiveAvgPool2d(1))
    model[9] = nn.Linear(12, 4)
    for layer in (model[5], model[7][0]):
        parametrize.register_parametrization(layer, "weight", Squared())
    model[7][0].parametrizations.weight.original = model[5].parametrizations.weight.original
    plan = Plan([Keep("3", [*range(5), *range(6, 11)])])
    with pytest.warns(UserWarning, match="5.weight"):
        small = pk.apply(model, plan, X)
    check(model, small, plan)


def test_modes_of_parametrised_layers_stay() -> None:
    model = each(net(), STAY["weight norm"]).train()
    model[0].eval()
    small = pk.apply(model, Plan([Keep("0", range(8))]), X)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]


ARCH = """
import torch
from torch import nn
from torch.nn.utils import {names}

def build():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), {layer}, nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 8, 8))
    return model.eval()
"""
SAVED = {
    "old weight norm": ("weight_norm", "weight_norm(nn.Conv2d(16, 8, 3))"),
    "weight norm": ("parametrizations", "parametrizations.weight_norm(nn.Conv2d(16, 8, 3))"),
    "old spectral norm": ("spectral_norm", "spectral_norm(nn.Conv2d(16, 8, 3))"),
    "spectral norm": ("parametrizations", "parametrizations.spectral_norm(nn.Conv2d(16, 8, 3))"),
    "masks": ("prune", "nn.Conv2d(16, 8, 3)"),
}


def built(kind: str, folder: Path) -> tuple[nn.Module, str]:
    names, layer = SAVED[kind]
    (folder / "arch.py").write_text(ARCH.format(names=names, layer=layer))
    arch = f"{folder}/arch.py:build"
    model: nn.Module = models.build(arch)
    nn.init.uniform_(model[1].weight, 0.2, 1)
    if kind == "masks":
        prune.l1_unstructured(model[3], "weight", 0.4)
    return model, arch


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.filterwarnings("ignore:plain weights now")
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, arch = built(kind, tmp_path)
    for ratio in (0.0, 0.4):
        small = pk.prune("slim", model, X, ratio=ratio).model if ratio else model
        stream = io.BytesIO()
        pk.save(small, stream, arch=arch)
        stream.seek(0)
        again = pk.load(stream, arch=arch)
        assert list(again.state_dict()) == list(small.state_dict())
        assert torch.equal(again(X), small(X))
        assert pk.inspect(again, X).cost == pk.inspect(small, X).cost


def test_a_file_with_a_parametrisation_that_its_code_does_not_have(tmp_path: Path) -> None:
    model, arch = built("masks", tmp_path)
    prune.remove(model[3], "weight")
    parametrizations.weight_norm(model[3])
    stream = io.BytesIO()
    pk.save(model, stream, arch=arch)
    stream.seek(0)
    with pytest.raises(InputError, match=r"'3\.parametrizations\.weight\.original0' that its architecture does not"):
        pk.load(stream, arch=arch)


@pytest.mark.parametrize("kind", ["masks", "old weight norm", "weight norm", "spectral norm"])
def test_an_export_holds_plain_weights(kind: str, tmp_path: Path) -> None:
    model = each(net(), {**STAY, **GO}[kind])
    pk.export(model, tmp_path / "model.pt2", X[:1])
    again = pk.load(tmp_path / "model.pt2")
    assert torch.allclose(again(X[:1]), model(X[:1]), atol=1e-5)
