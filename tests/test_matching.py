"""Matching a student's blocks with its teacher's: what is compared, that it teaches, and that it outlives a stop."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
from prunekit.data import ImageSet, open_data
from prunekit.errors import Interrupted
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import Event, StepEvent
from prunekit.training.matching import Matching


class Block(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Net(nn.Module):
    """Two residual blocks in a stage; the second ends the stage."""

    def __init__(self, inner: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.stage = nn.Sequential(Block(inner), Block(inner))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_data("digits", "train")


@pytest.fixture(scope="module")
def teacher(digits: ImageSet) -> Net:
    net = Net()
    train(net, TrainConfig(epochs=4, batch_size=32, lr=0.05, augment="none", device="cpu"), digits)
    return net.eval()


def narrow(net: Net) -> nn.Module:
    """The teacher without half of the channels inside its blocks; its streams stay as they are."""
    keeps = [pk.Keep(f"stage.{number}.body.0", range(0, 16, 2)) for number in range(2)]
    return pk.apply(net, pk.Plan(keeps), torch.zeros(1, 1, 8, 8))


def test_the_distance_is_the_mean_of_relative_errors_of_blocks_of_one_shape(teacher: Net) -> None:
    student, x = narrow(teacher), torch.rand(16, 1, 8, 8)
    matching = Matching(student, teacher)
    given: dict[nn.Module, list[Tensor]] = {}
    for net in (student, teacher):
        outputs = given[net] = []
        for name in ("stage.0.body", "stage.0", "stage.1.body", "stage.1"):
            net.get_submodule(name).register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[2]))
        net(x)
    errors = [(a - b).square().mean() / b.var(correction=0) for a, b in zip(*given.values(), strict=True)]
    found = matching.distance()
    assert found is not None
    torch.testing.assert_close(found, torch.stack(errors).mean())
    assert matching.distance() is None  # every pass counts once
    matching.close()
    student(x), teacher(x)
    assert matching.distance() is None


def test_a_teacher_that_was_trained_apart_is_no_aim_for_blocks(teacher: Net) -> None:
    student, x = Net(inner=8, seed=5), torch.rand(16, 1, 8, 8)
    matching = Matching(student, teacher)
    for _ in range(2):
        student(x), teacher(x)
        assert matching.distance() is None
    assert not any(matching.state()["matched blocks"])


def test_blocks_teach_more_in_the_same_steps_than_answers_alone(digits: ImageSet, teacher: Net) -> None:
    few, left = digits.sample(128), digits.sample(600, seed=1).inputs()
    away = {}
    for match in (0.0, 25.0):
        student = narrow(teacher)
        config = TrainConfig(epochs=3, batch_size=16, lr=0.001, distill=0.9, match=match, augment="none", device="cpu")
        train(student, config, few, teacher=teacher)
        with torch.no_grad():
            away[match] = float((student.eval()(left) - teacher(left)).square().mean())

    assert away[25.0] < 0.8 * away[0.0]


def test_a_stopped_run_goes_on_with_the_same_blocks(tmp_path: Path, digits: ImageSet, teacher: Net) -> None:
    few = digits.sample(64)
    config = TrainConfig(epochs=2, batch_size=16, lr=0.01, match=25.0, log_every=1, device="cpu")
    alone, student, path = narrow(teacher), narrow(teacher), tmp_path / "run.state"
    train(alone, config, few, teacher=teacher)

    def stop(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(student, config, few, teacher=teacher, state_path=path, on_event=stop)
    again = narrow(teacher)
    train(again, config, few, teacher=teacher, state_path=path, resume=True)
    for (name, x), y in zip(alone.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
