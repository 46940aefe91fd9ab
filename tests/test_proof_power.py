"""What a proof must see: outputs in any object, modes, random draws, several weights in one module."""

from __future__ import annotations

import collections
import random
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit as pk
from networks import lively
from prunekit import surgery
from prunekit.errors import SurgeryError
from prunekit.plan import Fold, Gate, Keep, Plan, Refit
from prunekit.surgery.execution.outputs import tensors_of

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Body(nn.Module):
    """Two stages; `_run` says what is returned of the scores and of what is inside."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head, self._run = nn.Linear(6, 4), run
        lively(self)

    def forward(self, x: Tensor) -> Any:
        features = self.first(x)
        inner = self.second(features)
        return self._run(self.head(inner.mean((2, 3))), inner)


@dataclass
class Record:
    scores: Tensor
    inner: Any = None


class Named(NamedTuple):
    scores: Tensor
    inner: Any


class Attributes:
    def __init__(self, scores: Tensor | None, inner: Any) -> None:
        self.scores, self.inner = scores, inner


class Slotted:
    __slots__ = ("__hidden", "scores")

    def __init__(self, scores: Tensor, inner: Any) -> None:
        self.scores, self.__hidden = scores, inner


class SlottedMore(Slotted):
    __slots__ = ("never_set",)


class Lookup(collections.abc.Mapping):
    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Any:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class WithExtra(dict):
    """A mapping that has attributes besides."""


def cyclic(scores: Tensor, inner: Any) -> Any:
    one: Any = Attributes(scores, [inner])
    one.inner.append(one)
    one.itself = one
    return one


def extra(scores: Tensor, inner: Any) -> Any:
    result: Any = WithExtra(scores=scores)
    result.inner = inner
    return result


OUTPUTS: dict[str, Callable[[Tensor, Any], Any]] = {
    "tuple": lambda s, i: (s, i),
    "data class": Record,
    "named tuple": Named,
    "attributes": Attributes,
    "slots": Slotted,
    "slots of a base class": SlottedMore,
    "mapping": lambda s, i: Lookup(scores=s, inner=i),
    "mapping with attributes": extra,
    "deque": lambda s, i: collections.deque([s, i]),
    "namespace": lambda s, i: types.SimpleNamespace(a=s, b={"c": [i]}),
    "nested": lambda s, i: {"a": [Record(s, Named(s, Attributes(i, None)))]},
    "cycle": cyclic,
    "distribution": lambda _, i: torch.distributions.Normal(i, i.exp()),
    "complex": lambda s, i: (s, torch.complex(i, i)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_returned_in_any_object_is_kept_and_compared(name: str) -> None:
    model = Body(OUTPUTS[name])
    graph = surgery.trace(model, X)
    assert not graph.group("second.0").free
    assert len(graph.group("first.0").free) == 8
    plan = Plan([Keep("first.0", range(5))])
    small = pk.apply(model, plan, X)
    with torch.no_grad():
        small.second[0].weight[0] += 0.1
    with pytest.raises(SurgeryError, match="does not compute what was meant"):
        pk.verify(model, small, plan, X)


NOTHING: dict[str, Callable[[Tensor, Any], Any]] = {
    "nothing": lambda *_: None,
    "numbers": lambda *_: [1, 2.0, "three"],
    "a class index": lambda s, _: s.argmax(1),
    "a mask": lambda _, i: {"mask": i > 0},
    "nothing of it": lambda s, _: s[:0],
    "a generator": lambda s, _: (x for x in [s]),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_proof_that_compares_nothing_is_none(name: str) -> None:
    model = Body(NOTHING[name])
    graph = surgery.trace(model, X)
    plan = Plan([Keep("first.0", range(5))])
    with pytest.raises(SurgeryError, match="no floating-point tensor"):
        surgery.verify(model, surgery.edit(model, plan, graph), plan, graph)


def test_indices_and_masks_are_compared_beside_scores() -> None:
    model, plan = Body(lambda s, _: (s, s.argmax(1), s > 0)), Plan([Keep("first.0", range(5))])
    small = pk.apply(model, plan, X)
    small._run = lambda s, _: (s, s.argmin(1), s > 0)
    with pytest.raises(SurgeryError, match="does not compute what was meant"):
        pk.verify(model, small, plan, X)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda s, _: s, "does not return"),
        (lambda s, i: (s, i, i), r"returns 'output\[2\]'"),
        (lambda s, i: (s, i[:, :1]), "shape"),
        (lambda s, i: (s, i.float()), "float32"),
    ],
)
def test_both_return_the_same_tensors(other: Callable[..., Any], message: str) -> None:
    model, plan = Body(lambda s, i: (s, i)), Plan([Keep("first.0", range(5))])
    small = pk.apply(model, plan, X)
    small._run = other
    with pytest.raises(SurgeryError, match=message):
        pk.verify(model, small, plan, X)


def test_places_of_tensors() -> None:
    one = torch.zeros(1)
    found = tensors_of({"a": [Record(one, Slotted(one, (one,)))], 3: np.zeros(2), "m": nn.Linear(1, 1), "s": "text"})
    assert list(found) == ["['a'][0].scores", "['a'][0].inner._Slotted__hidden[0]", "['a'][0].inner.scores", "[3]"]
    assert list(tensors_of(one)) == [""]
    chain: Any = one
    for _ in range(5000):
        chain = Attributes(None, chain)
    assert len(tensors_of(chain)) == 1


def test_outputs_that_differ_in_shape_from_input_to_input() -> None:
    model = Body(lambda s, _: (s, s[s > 0]))
    plan = Plan([Keep("first.0", range(5))])
    assert pk.verify(model, pk.apply(model, plan, X), plan, X) <= 1e-10


class Noisy(Body):
    """Draws random numbers in eval mode: behind channels that go, and beside them."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__(lambda s, _: (s, torch.randn_like(s) + s))
        self.noise = noise

    def forward(self, x: Tensor) -> Any:
        inner = self.second(self.noise(self.first(self.noise(x))))
        return self._run(self.head(self.noise(inner).mean((2, 3))), inner)


NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x + torch.randn_like(x),
    "uniform": lambda x: x * torch.rand_like(x),
    "dropout": lambda x: F.dropout(x, 0.3, training=True),
    "in place": lambda x: x + torch.empty_like(x).normal_(),
    "exponential": lambda x: x + torch.empty_like(x).exponential_(),
    "a coin for each": lambda x: x * torch.bernoulli(torch.sigmoid(x)),
    "a coin": lambda x: x * torch.empty_like(x).bernoulli_(0.7),
    "of another shape": lambda x: x + torch.randn(1, dtype=x.dtype),
    "a permutation": lambda x: x[:, :, torch.randperm(x.size(2))],
    "of Python": lambda x: x * (1 + random.random()),
    "of NumPy": lambda x: x * float(1 + np.random.rand()),
}


@pytest.mark.parametrize("name", NOISE)
def test_random_numbers_are_the_same_for_both(name: str) -> None:
    model = Noisy(NOISE[name])
    graph = surgery.trace(model, X)
    free = graph.group("first.0").free
    plan = Plan([Keep("first.0", [1, 2, 4, 5, 7])]) if free else Plan()
    if name not in ("in place", "exponential", "a coin", "a permutation"):
        assert free
    small = surgery.edit(model, plan, graph)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)
    assert surgery.verify(model, small, plan, graph) <= 1e-10
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    np.testing.assert_equal(np.random.get_state(legacy=True), states[2])
    with torch.no_grad():
        small.head.weight[0, 0] += 0.1
    with pytest.raises(SurgeryError, match="first in 'head'"):
        surgery.verify(model, small, plan, graph)


def test_a_generator_of_the_networks_own_is_left_as_it_is() -> None:
    generator = torch.Generator().manual_seed(3)
    model = Body(lambda s, _: s + torch.randn(s.shape, generator=generator, dtype=s.dtype))
    plan, before = Plan([Keep("first.0", range(5))]), generator.get_state()
    graph = surgery.trace(model, X)
    state = generator.get_state()
    assert surgery.verify(model, surgery.edit(model, plan, graph), plan, graph) <= 1e-10
    assert torch.equal(generator.get_state(), state)
    assert before.shape == state.shape


def test_pruning_a_network_that_samples() -> None:
    class Sampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU())
            self.mean, self.spread = nn.Linear(32, 4), nn.Linear(32, 4)
            self.decode = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 20))

        def forward(self, x: Tensor) -> Any:
            hidden = self.encode(x)
            mean, spread = self.mean(hidden), self.spread(hidden)
            return self.decode(mean + torch.randn_like(mean) * torch.exp(0.5 * spread)), mean, spread

    model = lively(Sampling())
    for method in ("slim", "merge"):
        assert pk.prune(method, model, torch.zeros(1, 20, dtype=torch.float64), ratio=0.3).difference <= 1e-10


def test_the_result_is_proven_in_the_modes_it_is_in() -> None:
    model, plan = Body(lambda s, _: s), Plan([Keep("first.0", range(5))])
    small = pk.apply(model, plan, X)
    small.first[1].train()
    with pytest.raises(
        SurgeryError, match=r"'first\.1' of the pruned network is in training mode, the original in eval"
    ):
        pk.verify(model, small, plan, X)
    model.train()
    small = pk.apply(model, plan, X)
    assert all(module.training for module in small.modules())
    small.eval()
    with pytest.raises(SurgeryError, match="in eval mode, the original in training"):
        pk.verify(model, small, plan, X)


def test_what_did_not_run_is_not_proven() -> None:
    """A forward that takes another way for other values."""

    class Early(Body):
        def forward(self, x: Tensor) -> Any:
            features = self.first(x)
            if float(x.abs().max()) > 0:
                return features.sum((1, 2, 3)) * 0 + x.sum((1, 2, 3))
            return self.head(self.second(features).mean((2, 3)))

    model, zero = Early(lambda s, _: s), torch.zeros_like(X)
    graph = surgery.trace(model, zero)
    plan = Plan([Keep("first.0", range(5))])
    with pytest.raises(SurgeryError, match="the proof is not complete"):
        surgery.verify(model, surgery.edit(model, plan, graph), plan, graph)


def test_a_transformer_layer_is_proven_though_its_fast_path_hides_its_weights() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)).double().eval()
    x = torch.zeros(2, 5, 8, dtype=torch.float64)
    plan = Plan([Keep("0.linear1", range(9))])
    with torch.inference_mode():
        small = pk.apply(model, plan, x)
    assert small[0].linear2.in_features == 9


class LowRank(nn.Module):
    """Three weights in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a), self.lora_b)


class Steps(nn.Module):
    """A list of weights, each read by the next."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(F.linear(x, weight))
        return x


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift, self.out = (
            nn.Parameter(torch.randn(6, 8)),
            nn.Parameter(torch.randn(8)),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t(), self.shift))


def flat(layer: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), layer, nn.Tanh(), nn.Linear(width, 2)).double().eval()


FLAT = torch.zeros(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(("build", "width"), [(LowRank, 6), (Steps, 8)])
def test_groups_have_names_of_their_own(build: type[nn.Module], width: int) -> None:
    model = flat(build(), width)
    graph = surgery.trace(model, FLAT)
    names = [group.name for group in graph.groups]
    assert len(set(names)) == len(names)
    for group in graph.groups:
        assert graph.group(group.name) is group
        if len(group.free) < 3:
            continue
        plan = Plan([Keep(group.name, group.free[1:3])])
        small = surgery.edit(model, plan, graph)
        assert surgery.verify(model, small, plan, graph) <= 1e-10
        tensors = dict(small.named_parameters())
        for member in (*group.producers, *group.consumers):
            assert tensors[member.parameter].size(member.dim) == 2


def test_names_of_modules_that_make_one_group_are_as_before() -> None:
    graph = surgery.trace(flat(LowRank(), 6), FLAT)
    assert [group.name for group in graph.groups] == ["0", "2.weight", "2.lora_a", "4"]
    assert graph.group("0.weight") is graph.group("0")
    with pytest.raises(SurgeryError, match="makes several channel groups"):
        graph.group("2")


def test_a_module_whose_other_groups_stay_is_a_name_still() -> None:
    model = flat(LowRank(), 6)[:3]
    graph = surgery.trace(model, FLAT)
    assert graph.group("2").name == "2.lora_a"
    assert graph.group("2.weight").reason == "the model's output"


def test_weights_are_addressed_by_their_own_names_where_a_module_has_several() -> None:
    model = flat(LowRank(), 6)
    graph = surgery.trace(model, FLAT)
    assert [graph.address(m.parameter) for m in graph.group("0").consumers] == ["2.weight", "2.lora_a"]
    assert graph.address("4.weight") == "4"
    keep, matrix = Keep("0", [0, 2, 3, 5, 7]), torch.randn(3, 5)
    plan = Plan([keep, *(Fold(name, "0", matrix=matrix) for name in ("2.weight", "2.lora_a"))])
    assert surgery.verify(model, surgery.edit(model, plan, graph), plan, graph) <= 1e-10
    with pytest.raises(SurgeryError, match="through several weights"):
        surgery.edit(model, Plan([keep, Fold("2", "0", matrix=matrix)]), graph)
    plan = Plan([Keep("2.lora_a", [0, 3]), Refit("2", {"lora_a": torch.randn(2, 8), "lora_b": torch.randn(6, 2)})])
    assert surgery.verify(model, surgery.edit(model, plan, graph), plan, graph) <= 1e-10


def test_a_tied_autoencoder_is_pruned_on_both_sides() -> None:
    model = flat(Tied(), 2)
    graph = surgery.trace(model, FLAT)
    hidden = next(group for group in graph.groups if group.size == 6)
    assert hidden.free
    plan = Plan([Keep(hidden.name, [0, 1, 4])])
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) <= 1e-10
    assert small[2].weight.shape == (3, 8)
    with pytest.raises(SurgeryError, match="cannot be merged"):
        surgery.edit(model, Plan([plan.keeps[0], Fold(hidden.name, hidden.name, matrix=torch.zeros(3, 3))]), graph)


def test_one_parameter_that_makes_several_groups() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.left, self.right = nn.Parameter(torch.randn(8, 6)), nn.Linear(8, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = x[:, :6], x[:, 6:]
            return self.left(torch.tanh(F.linear(a, self.table))) + self.right(torch.tanh(b @ self.table))

    model, x = Both().double().eval(), torch.zeros(2, 14, dtype=torch.float64)
    graph = surgery.trace(model, x)
    names = [group.name for group in graph.groups]
    assert len(set(names)) == len(names)
    for group in graph.groups:
        assert graph.group(group.name) is group


def test_what_stays_behind_a_batch_norm_stays_in_its_stream() -> None:
    """The reader of a stream takes channels by number: the stream keeps them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.b, self.out = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.n(self.a(x))
            stream = stream + self.b(torch.relu(self.norm(stream).roll(1, 1)))
            return self.out(stream.mean((2, 3)))

    model = lively(Net())
    graph = surgery.trace(model, X)
    assert not graph.group("norm").free
    assert not graph.group("a").free


def test_what_surgery_puts_in_is_in_the_mode_of_what_was_there() -> None:
    """A batch norm that is frozen in a network that trains, say."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    plan = Plan([Gate("0", "1", hidden=2, rectified=True)])
    for modes in ((False, False), (True, True), (True, False)):
        model.train()
        for module, mode in zip(model, modes, strict=False):
            module.train(mode)
        small = pk.apply(model, plan, X)
        assert [module.training for module in small] == [module.training for module in model]
        assert small[0].norm.training == modes[1]
