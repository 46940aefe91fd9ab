"""A pruned network in somebody's own code: pickled, copied, compiled, exported, and trained on by its old optimiser."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import prunekit as pk
from prunekit import surgery

X = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """A residual block, so that a stream, an inner layer and a linear layer are there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.back = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.back(self.inner(x))).mean((2, 3)))


def network() -> Net:
    model = Net()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.2, 1.5)
    return model


OPTIMISERS: dict[str, Callable[[Iterable[nn.Parameter]], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=1e-2),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=1e-2),
}


def step(model: nn.Module, optimizer: optim.Optimizer, seed: int, mask: dict[str, Tensor] | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(16, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(16) % 4
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for name, stays in (mask or {}).items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient.mul_(stays)
    optimizer.step()


def pruned_without_restoring(model: nn.Module) -> pk.Pruned:
    return pk.slim(model, X.double(), ratio=0.4, restore="none", scope="all")


@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_goes_on_as_that_of_the_masked_network(name: str) -> None:
    """The reference is the whole network, in which whoever reads a removed channel has zeros for it, and keeps them."""
    model = network().double()
    optimizer = OPTIMISERS[name](model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    done = pruned_without_restoring(model)
    masked, stays = copy.deepcopy((model, optimizer)), {}
    whole, wholes_optimizer = masked
    indices = surgery.resolve(done.graph, done.plan).indices
    assert any(dim == 1 for _, dim in indices)
    for parameter, dim in [key for key in indices if key[1] == 1]:
        tensor = whole.get_parameter(parameter)
        mask = torch.zeros_like(tensor).index_fill_(dim, torch.from_numpy(indices[parameter, dim]), 1)
        stays[parameter] = mask
        tensor.data *= mask
        for key, value in wholes_optimizer.state[tensor].items():
            if value.shape == tensor.shape:
                wholes_optimizer.state[tensor][key] = value * mask
    pk.narrow_state(optimizer, model, done)
    small = done.model.train()
    for seed in range(3, 6):
        step(small, optimizer, seed)
        step(whole, wholes_optimizer, seed, stays)
    for parameter, tensor in small.named_parameters():
        expected = whole.get_parameter(parameter)
        for dim in range(tensor.dim()):
            if (parameter, dim) in indices:
                expected = expected.index_select(dim, torch.from_numpy(indices[parameter, dim]))
        torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-10)


def test_groups_schedulers_and_other_parameters_stay() -> None:
    model, other = network(), nn.Parameter(torch.ones(3))
    optimizer = optim.SGD(
        [{"params": [*model.stem.parameters(), other], "lr": 0.1}, {"params": model.head.parameters()}], lr=0.2
    )
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    done = pk.slim(model, X, ratio=0.4, scope="all")
    pk.narrow_state(optimizer, model, done)
    own = dict(done.model.named_parameters())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        *(id(own[f"stem.{n}"]) for n in ("0.weight", "1.weight", "1.bias")),
        id(other),
    ]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
    pickle.dumps(optimizer.state_dict())


def test_a_bias_that_surgery_has_made_is_trained() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1, bias=False))
    nn.init.uniform_(model[1].weight)
    nn.init.normal_(model[1].bias)
    optimizer = optim.Adam(model.parameters())
    done = pk.slim(model, X, ratio=0.5, restore="constants")
    pk.narrow_state(optimizer, model, done)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in done.model.parameters()}
    assert done.model[3].bias is not None


def test_what_cannot_be_narrowed_is_told_and_left_alone() -> None:
    model = network()
    done = pk.slim(model, X, ratio=0.4)
    strange = optim.SGD(model.parameters(), lr=0.1)
    weight = model.inner[0].weight
    strange.state[weight]["factors"] = torch.ones(5)
    with pytest.raises(pk.InputError, match=r"keeps 'factors' of 'inner.0.weight' as \(5,\)"):
        pk.narrow_state(strange, model, done)
    assert any(p is weight for p in strange.param_groups[0]["params"])
    with pytest.raises(pk.InputError, match="no parameter of this network"):
        pk.narrow_state(optim.SGD(network().parameters(), lr=0.1), model, done)


def test_the_penalty_is_the_sum_of_the_gammas() -> None:
    model = network()
    model.stem[1].weight.requires_grad_(False)
    found = pk.sparsity_penalty(model)
    assert float(found.detach()) == pytest.approx(float(model.inner[1].weight.detach().abs().sum()))
    found.backward()
    assert model.inner[1].weight.grad is not None
    assert torch.equal(model.inner[1].weight.grad, torch.ones(12))
    with pytest.raises(pk.TrainingError, match="nothing to penalise"):
        pk.sparsity_penalty(nn.Linear(2, 2))


def test_a_pruned_network_is_an_ordinary_module() -> None:
    small = pk.slim(network().eval(), X, ratio=0.4, scope="all").model.eval()
    x = torch.rand(2, 3, 8, 8)
    expected = small(x)
    stream = io.BytesIO()
    torch.save(small, stream)
    stream.seek(0)
    others: list[Any] = [
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        torch.load(stream, weights_only=False),
        torch.compile(small, backend="eager", fullgraph=True),
        torch.export.export(small, (x,)).module(),
    ]
    for other in others:
        torch.testing.assert_close(other(x), expected)


def test_what_is_left_of_a_block_takes_its_place_in_the_optimiser() -> None:
    model = pk.load("prunekit:resnet20").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    plan = pk.Plan([pk.Keep("layer1.1.conv1", [])])
    done = dataclasses.replace(pk.slim(model, ratio=0.1), model=pk.apply(model, plan), plan=plan)
    pk.narrow_state(optimizer, model, done)
    assert optimizer.param_groups[0]["params"] == list(done.model.parameters())
    skip = done.model.get_submodule("layer1.1")
    before = skip.bias.detach().clone()
    done.model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert not torch.equal(skip.bias, before)
