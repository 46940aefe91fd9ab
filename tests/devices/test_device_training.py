"""Training on a second device gives the weights that the CPU gives, resumed or not; devices and what they lack."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import second_device
import torch
from compared import CPU, branches, digits, network_with_gates, same, small_network
from torch import nn

import prunekit as pk
from prunekit import devices
from prunekit.errors import InputError, Interrupted, TrainingError
from prunekit.training.state import State

VARIANTS_OF_RUNS: dict[str, dict[str, Any]] = {
    "slimming": {"sparsity": 1e-3},
    "everything": {"accumulate": 2, "ema": 0.9, "clip": 1.0, "warmup": 1.0, "label_smoothing": 0.1, "augment": "cifar"},
    "proximal adamw": {"optimizer": "adamw", "lr": 1e-3, "proximal": True, "sparsity": 1e-3},
    "best kept": {"keep": "best", "lr": 0.5},
    "plain layout": {"channels_last": False, "augment": "imagenet"},
    "inner gammas": {"sparsity": 1e-3, "sparsity_scope": "inner"},
}


def config(device: torch.device, **changes: Any) -> pk.TrainConfig:
    settings = {"epochs": 2, "batch_size": 32, "lr": 0.05, "log_every": 1, "device": str(device)}
    return pk.TrainConfig(**{**settings, **changes})


def trained(device: torch.device, model: nn.Module, *, path: Path | None = None, **changes: Any) -> Any:
    model = copy.deepcopy(model)
    teacher = copy.deepcopy(model) if changes.pop("distil", False) else None
    more = {name: changes.pop(name) for name in ("resume", "on_event") if name in changes}
    done = pk.train(
        model, config(device, **changes), digits("train", 128), digits(), teacher=teacher, state_path=path, **more
    )
    assert next(model.parameters()).device == CPU, "a network comes back to where it was"
    return model, [(event.loss, event.accuracy, event.val_loss, event.sparsity) for event in done.history]


@pytest.mark.parametrize("variant", VARIANTS_OF_RUNS)
def test_a_run_gives_the_weights_of_the_cpu(variant: str, device: torch.device) -> None:
    settings = VARIANTS_OF_RUNS[variant]
    wanted = trained(CPU, small_network(), **settings)
    same(trained(device, small_network(), **settings), wanted, None)


def test_a_distilled_run(device: torch.device) -> None:
    wanted = trained(CPU, small_network(), distil=True)
    same(trained(device, small_network(), distil=True), wanted, None)


def test_dropout_draws_from_the_generator_of_the_device(device: torch.device) -> None:
    model = branches()
    before = torch.second.get_rng_state(device)  # type: ignore[attr-defined]
    wanted = trained(CPU, model)
    same(trained(device, model), wanted, None)
    after = torch.second.get_rng_state(device)  # type: ignore[attr-defined]
    assert torch.equal(before, after), "the caller's random numbers are left alone"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision: str, device: torch.device) -> None:
    """The device has no kernels for half precision other than the CPU's; fp16 is scaled on both."""
    model, history = trained(device, small_network(), precision=precision)
    plain, plain_history = trained(device, small_network())
    assert 0 < max((p - q).abs().max() for p, q in zip(model.parameters(), plain.parameters(), strict=True)) < 0.2
    assert history[-1][0] == pytest.approx(plain_history[-1][0], rel=0.1)


class StopAt:
    def __init__(self, moment: int) -> None:
        self.left = moment

    def __call__(self, _: object) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_gives_the_same_weights(optimizer: str, device: torch.device, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "lr": 0.01, "ema": 0.9, "keep": "best", "precision": "fp16"}
    wanted = trained(device, small_network(), **settings)
    path = tmp_path / "state"
    with pytest.raises(Interrupted):
        trained(device, small_network(), path=path, on_event=StopAt(7), **settings)
    kept = State.load(path).tensors
    assert kept["optimizer"]["state"]
    same(trained(device, small_network(), path=path, resume=True, **settings), wanted, None)


def test_images_go_to_the_device_where_they_fit(device: torch.device) -> None:
    data = digits()
    assert isinstance(data.images, torch.Tensor)
    assert data.images.nbytes == 48 * 64
    assert data.resident(device).labels.device == device
    assert data.resident(CPU) is data
    others = torch.zeros(20_000, device=device)  # what others hold there does not count as free
    with second_device.present(memory=10_000):
        assert data.resident(device) is data, "more than a quarter of what is free"
    del others


def test_images_that_do_not_fit_are_sent_batch_by_batch(device: torch.device) -> None:
    wanted = trained(CPU, small_network(), augment="cifar")
    with second_device.present(memory=10_000):
        same(trained(device, small_network(), augment="cifar"), wanted, None)


def test_sub_networks_with_gates(device: torch.device) -> None:
    recipe = pk.manidp.GateRecipe(keep=0.6)

    def gated(place: torch.device) -> Any:
        model = pk.manidp.add_gates(small_network(), recipe)
        settings = config(place, lr=0.02)
        done = pk.manidp.train(model, recipe, settings, digits("train", 256), digits())
        return model, done.keep

    same(gated(device), gated(CPU), None)


def test_a_network_divided_among_devices_is_refused(device: torch.device) -> None:
    model = small_network()
    model.fc.to(device)
    plan = pk.Plan([pk.Keep("features.0", range(4))])
    whole = small_network()
    with_data: dict[str, Any] = {"train_set": digits("train", 64)}
    calls = {
        "prune": lambda: pk.slim(model, ratio=0.5),
        "inspect": lambda: pk.inspect(model),
        "apply": lambda: pk.apply(model, plan),
        "restore": lambda: pk.restore(model, plan),
        "verify": lambda: pk.verify(model, pk.apply(whole, plan), plan),
        "evaluate": lambda: pk.evaluate(model),
        "export": lambda: pk.export(model, "net.pt2"),
        "train": lambda: pk.train(model, config(CPU), with_data["train_set"]),
    }
    for call in calls.values():
        with pytest.raises(
            InputError, match=r"divided among devices: cpu \('features.0.weight'\), second:0 \('fc.weight'\)"
        ):
            call()


@pytest.mark.parametrize("name", ["second:7", "banana", "xpu", "meta", "second:x"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=f"device '{name}' cannot be used") as found:
        devices.chosen(name)
    assert found.value.hint == "there are cpu, second:0, second:1"


def test_what_is_chosen_by_itself(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.chosen(None) == devices.chosen("auto") == devices.chosen("second") == device
    assert devices.chosen("cpu") == CPU
    assert devices.chosen("second:1") == torch.device("second:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.chosen("auto") == torch.device("second:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(TrainingError, match="process 2 has no device: there are 2 of the kind 'second'"):
        devices.chosen("second")
    torch.ops.second_device.set_available(False)
    assert devices.chosen("auto") == CPU
    assert devices.present() == ["cpu"]


def test_generators_of_the_device_that_is_meant(device: torch.device) -> None:
    other = torch.device("second:1")
    state = torch.second.get_rng_state(device)  # type: ignore[attr-defined]
    devices.seed_generators(other, 5)
    assert torch.equal(torch.second.get_rng_state(device), state)  # type: ignore[attr-defined]
    drawn = torch.rand(3, device=other)
    with devices.forked_generators(other):
        devices.seed_generators(other, 5)
        assert torch.equal(torch.rand(3, device=other), drawn)
    devices.seed_generators(other, 5)
    torch.rand(3, device=other)
    assert torch.rand(1, device=other) != drawn[0]


class Drawing(nn.Module):
    """Draws random numbers along channels that may go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + torch.randn_like(x) + nn.functional.dropout(x))


@pytest.mark.parametrize("index", [0, 1])
def test_a_forward_that_draws_on_either_device(index: int) -> None:
    torch.manual_seed(0)
    model, x = Drawing().to(f"second:{index}"), torch.randn(2, 1, 8, 8)
    plan = pk.Plan([pk.Keep("first", range(0, 8, 2))])
    small = pk.apply(model, plan, x)
    assert pk.verify(model, small, plan, x) < 1e-5
    assert next(small.parameters()).device == torch.device("second", index)


class TestWithoutDouble:
    """A device without float64, as Apple's are: proofs and what makes up for channels are computed on the CPU."""

    @pytest.fixture(autouse=True)
    def _without(self) -> Any:
        with second_device.present(double=False):
            yield

    def test_pruning(self, device: torch.device) -> None:
        images = digits("train", 64).inputs()
        for name, settings in (("slim", {}), ("merge", {"images": images}), ("merge", {"restore": "moments"})):
            wanted = pk.prune(name, small_network(), ratio=0.4, **settings)
            found = pk.prune(name, small_network().to(device), ratio=0.4, **settings)
            same(found.model, wanted.model, device)
            plan = found.plan
            assert pk.verify(small_network().to(device), found.model, plan) == pk.verify(
                small_network(), wanted.model, plan
            )
            assert pk.restore(small_network().to(device), pk.Plan(plan.keeps), images=images).refits
            same(pk.apply(small_network().to(device), plan), wanted.model, device)

    def test_training_and_gates(self, device: torch.device) -> None:
        assert trained(device, small_network(), sparsity=1e-3)[1][-1][0] > 0
        recipe = pk.manidp.GateRecipe(keep=0.6)
        model = pk.manidp.add_gates(small_network().to(device), recipe)
        pk.manidp.train(model, recipe, config(device), digits("train", 128), digits())
        view = pk.manidp.GatedView.of(copy.deepcopy(network_with_gates()).to(device))
        budget = pk.manidp.calibrate(view, digits("train", 200).batches, 0.7 * view.cost.dense, "70%")
        assert budget.realised / view.cost.dense == pytest.approx(0.7, abs=0.05)
        pk.manidp.foresee(view.model, digits("train", 100).inputs(), 1.0)
        pk.manidp.add_buckets(view, digits("train", 80).inputs(), 2)
        assert pk.manidp.bucketed(view.model)(digits().inputs().to(device)).shape == (48, 10)

    def test_a_latency_as_the_goal_is_refused(self, device: torch.device) -> None:
        with pytest.raises(InputError, match="which has no float64, cannot be a goal"):
            pk.slim(small_network().to(device), target_latency="60%")

    def test_a_network_in_float64_is_refused_by_the_device_with_its_name(self, device: torch.device) -> None:
        with pytest.raises(InputError, match=r"'features.0.weight' is in float64, which second:0 does not have"):
            pk.train(small_network(torch.float64), config(device), digits("train", 64))
