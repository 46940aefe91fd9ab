"""Mistakes in training are told as what they are, with what to do: never as a bug of prunekit, never as a traceback."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import checkpoint, models
from prunekit.cli.app import run
from prunekit.data import ImageSet, open_data
from prunekit.errors import InputError, TrainingError
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train

QUICK = {"epochs": 1, "batch_size": 8, "device": "cpu", "augment": "none", "log_every": 1}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**QUICK, **changes})


@pytest.fixture(scope="module")
def few() -> ImageSet:
    return open_data("digits", "train").subset(range(16))


class Returns(nn.Module):
    """A classifier whose forward returns what `make` makes of its scores; in training only, if so asked."""

    def __init__(self, make: Callable[[Tensor], Any], *, in_training: bool = False) -> None:
        super().__init__()
        self.make, self.in_training = make, in_training
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        scores = self.fc(x.flatten(1))
        return self.make(scores) if self.training or not self.in_training else scores


def fails(_: Tensor) -> Tensor:
    raise KeyError("shape")


ANSWERS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "two heads": (lambda y: (y, y[:, :4]), r"a tuple of \(\d, 10\), \(\d, 4\)"),
    "a dict": (lambda y: {"logits": y, "embedding": y}, r"a dict of logits \(\d, 10\), embedding"),
    "a list": (lambda y: [y, y], r"a list of \(\d, 10\), \(\d, 10\)"),
    "nothing": (lambda _: None, "returns None"),
    "an empty tuple": (lambda _: (), "a tuple of nothing"),
    "an object": (lambda _: object(), "an object of the type object"),
    "a map": (lambda y: y[:, :, None, None], r"a tensor of shape \(\d, 10, 1, 1\)"),
    "one number each": (lambda y: y[:, 0], r"a tensor of shape \(\d,\)"),
    "a loss": (lambda y: y.sum(), r"a tensor of shape \(\)"),
    "labels": (lambda y: y.argmax(1, keepdim=True), r"a tensor of torch.int64 of shape"),
    "fewer images": (lambda y: y[:1], r"shape \(1, 10\), expected class scores of shape \([28], classes\)"),
    "an error": (fails, r"failed on a batch of shape \(\d, 1, 8, 8\): KeyError: 'shape' .*line \d+\)\n.*its own code"),
}


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_network_that_answers_something_else(few: ImageSet, name: str, in_training: bool) -> None:
    make, said = ANSWERS[name]
    with pytest.raises(TrainingError, match=said):
        train(Returns(make, in_training=in_training), config(), few)


@pytest.mark.parametrize("make", [lambda y: (y, None), lambda y: (y, y), lambda y: (y,)])
def test_auxiliary_classifiers_are_welcome(few: ImageSet, make: Callable[[Tensor], Any]) -> None:
    train(Returns(make, in_training=True), config(), few, few)
    train(Returns(make), config(), few, few)


def test_an_error_in_validation_alone(few: ImageSet) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training and len(x) > 2:
                raise ValueError("too many")
            out: Tensor = self.fc(x.flatten(1))
            return out

    with pytest.raises(TrainingError, match=r"batch of shape \(16, 1, 8, 8\): ValueError: too many"):
        train(Late(), config(), few, few)


def flat(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 8, "accumulate": 8}])
def test_batch_norm_with_one_image(few: ImageSet, changes: dict[str, int]) -> None:
    with pytest.raises(TrainingError, match=r"more than 1 value.*\n.*raise --batch-size"):
        train(flat(nn.Linear(64, 10), nn.BatchNorm1d(10)), config(**changes), few)


def test_a_set_of_one_image(few: ImageSet) -> None:
    with pytest.raises(TrainingError, match=r"batch of shape \(1, 1, 8, 8\).*\n.*a set that has as many"):
        train(flat(nn.Linear(64, 10), nn.BatchNorm1d(10)), config(), few.subset([0]))
    train(flat(nn.Linear(64, 10)), config(), few.subset([0]))


def test_a_last_batch_of_one_image_waits(few: ImageSet) -> None:
    train(flat(nn.Linear(64, 10), nn.BatchNorm1d(10)), config(), few.subset(range(9)), few.subset(range(9)))


def test_a_set_without_images(few: ImageSet) -> None:
    with pytest.raises(InputError, match="no images"):
        train(flat(nn.Linear(64, 10)), config(), few.subset([]))


@pytest.mark.parametrize("bad", [-1, 10, 255])
@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_out_of_range(few: ImageSet, bad: int, split: str) -> None:
    labels = few.labels.clone()
    labels[3] = bad
    wrong = dataclasses.replace(few, labels=labels)
    with pytest.raises(InputError, match=rf"labels from .*{bad}|labels from {bad}"):
        train(flat(nn.Linear(64, 10)), config(), *((wrong, few) if split == "train" else (few, wrong)))


def test_labels_that_are_no_whole_numbers(few: ImageSet) -> None:
    with pytest.raises(InputError, match=r"torch.float32, expected torch.int64"):
        train(flat(nn.Linear(64, 10)), config(), dataclasses.replace(few, labels=few.labels.float()))


def test_a_loss_that_never_was_a_number(few: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"before the first step\n.*division"):
        train(Returns(lambda y: y * math.nan), config(), few)
    lost = flat(nn.Linear(64, 10))
    nn.init.constant_(lost[1].bias, math.nan)
    with pytest.raises(TrainingError, match=r"before the first step\n.*weights that were lost"):
        train(lost, config(), few, state_path=tmp_path / "run.state")


def test_weights_of_several_dtypes(few: ImageSet) -> None:
    with pytest.raises(TrainingError, match=r"dtype.*\n.*one dtype"):
        train(flat(nn.Linear(64, 10), nn.Linear(10, 10).half()), config(), few)


def test_the_first_parameter_need_not_be_a_weight(few: ImageSet) -> None:
    model = flat(nn.Linear(64, 10))
    model.register_parameter("mask", nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False))
    train(model, config(), few)


def test_a_network_that_lets_no_gradient_through(few: ImageSet) -> None:
    with pytest.raises(TrainingError, match=r"gradient .* cannot be computed.*\n.*detach"):
        train(Returns(lambda y: y.detach()), config(), few)


def test_a_gradient_that_fails(few: ImageSet) -> None:
    def overwritten(y: Tensor) -> Tensor:
        z = y.exp()
        z.add_(1)
        return z

    with pytest.raises(TrainingError, match=r"gradient of the network cannot be computed.*inplace"):
        train(Returns(overwritten, in_training=True), config(), few)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (flat(nn.Linear(64, 7)), "teacher knows 7 classes, and the network 10"),
        (nn.Conv2d(3, 4, 3), "failed on a batch"),
        (Returns(lambda y: {"logits": y}), "a dict of logits"),
    ],
)
def test_a_teacher_that_does_not_fit(few: ImageSet, teacher: nn.Module, said: str) -> None:
    with pytest.raises(InputError, match=said):
        train(flat(nn.Linear(64, 10)), config(), few, teacher=teacher)


def test_no_memory_to_validate_in(few: ImageSet) -> None:
    class Large(Returns):
        def forward(self, x: Tensor) -> Any:
            if not self.training and len(x) > 2:
                raise MemoryError
            return super().forward(x)

    with pytest.raises(TrainingError, match=r"out of memory with batches of 8 images"):
        train(Large(lambda y: y), config(), few, few)


CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10, channels=1, made=None):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.Linear(144, made or num_classes))
    def forward(self, x):
        return self.net(x)

def ten(): return Net()
def five(): return Net(5)
def colour(num_classes): return Net(num_classes, 3)
def broken(num_classes):
    net = Net(num_classes)
    net.forward = lambda x: 1 / 0
    return net
"""


@pytest.mark.parametrize(
    ("name", "flags", "status", "said"),
    [
        ("ten", [], 0, ""),
        ("five", [], 2, "classifier has 5 outputs"),
        ("colour", [], 2, "--input-size"),
        ("colour", ["--input-size", "3x8x8"], 0, ""),
        ("broken", [], 2, "net.py, line"),
        ("Net", ["--batch-size", "1", "--accumulate", "2"], 2, "cannot be divided evenly"),
    ],
)
def test_from_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    flags: list[str],
    status: int,
    said: str,
) -> None:
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    command = [
        "train",
        "--arch",
        f"net.py:{name}",
        "--data",
        "digits",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "-o",
        "a.pt",
    ]
    assert run([*command, *flags]) == status
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("saved", ["artefact", "state dict", "bundled"])
def test_a_teacher_of_code_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str) -> None:
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    teacher = models.build("vgg_digits" if saved == "bundled" else "net.py:Net")
    if saved == "state dict":
        torch.save(teacher.state_dict(), "teacher.pt")
    else:
        checkpoint.save(teacher, "teacher.pt")
    command = ["train", "--arch", "net.py:Net", "--data", "digits", "--epochs", "1", "--device", "cpu", "-o", "a.pt"]
    assert run([*command, "--distill", "teacher.pt"]) == 0
    assert run([*command[:1], "a.pt", *command[3:-1], "b.pt", "--arch", "net.py:Net", "--distill", "teacher.pt"]) == 0
    assert run([*command[:1], "a.pt", *command[3:-1], "c.pt", "--arch", "net.py:Net", "--distill", "nowhere.pt"]) == 2
