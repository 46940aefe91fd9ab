"""Interrupting and resuming: the same weights, bit for bit, whatever happens in between."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from processes import ended, script
from prunekit.data import ImageSet, open_data
from prunekit.errors import Interrupted, TrainingError
from prunekit.spec import Origin, remember
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import EpochEvent, Event, SaveEvent, StartEvent, StepEvent
from prunekit.training.sinks import MetricsFile
from prunekit.training.state import State

ROOT = Path(__file__).resolve().parents[1]


def config(**changes: Any) -> TrainConfig:
    settings = {"epochs": 3, "batch_size": 64, "lr": 0.05, "log_every": 1, "device": "cpu", "sparsity": 1e-3}
    return TrainConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def few() -> ImageSet:
    return open_data("digits", "train").sample(256)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, 10),
    )  # fmt: skip


class StopAt:
    """A sink that sends a signal to this process at one event."""

    def __init__(self, moment: int, number: signal.Signals = signal.SIGINT) -> None:
        self.moment, self.number, self.events = moment, number, list[Event]()

    def __call__(self, event: Event) -> None:
        if len(self.events) == self.moment:
            signal.raise_signal(self.number)
        self.events.append(event)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


VARIANTS: dict[str, dict[str, Any]] = {
    "slimming": {},
    "everything": {"accumulate": 2, "ema": 0.9, "clip": 1.0, "warmup": 1.0, "label_smoothing": 0.1},
    "proximal adamw": {"optimizer": "adamw", "lr": 1e-3, "proximal": True},
    "half precision": {"precision": "bf16", "schedule": "step"},
    "best kept": {"keep": "best", "ema": 0.9, "lr": 0.5},
    "plain layout": {"channels_last": False, "augment": "imagenet"},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_stopped_at_any_event_a_run_ends_with_the_same_weights(few: ImageSet, tmp_path: Path, variant: str) -> None:
    settings = config(**VARIANTS[variant])
    alone = net()
    expected = train(alone, settings, few, few, state_path=tmp_path / "alone")
    for moment in (0, 3, 6, 9, 14):
        state = tmp_path / f"{moment}"
        number = (signal.SIGINT, signal.SIGTERM)[moment % 2]
        with pytest.raises(Interrupted, match=r"interrupted in epoch .*\n.*--resume"):
            train(net(), settings, few, few, state_path=state, on_event=StopAt(moment, number))
        again = net()
        result = train(again, settings, few, few, state_path=state, resume=True)
        assert_same(alone, again)
        figures = [(e.epoch, e.step, e.loss, e.accuracy, e.val_loss, e.sparsity) for e in result.history]
        assert figures == [(e.epoch, e.step, e.loss, e.accuracy, e.val_loss, e.sparsity) for e in expected.history]


def test_a_signal_while_validating_is_heard(few: ImageSet, tmp_path: Path) -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += not self.training
            if self.seen == 2:  # the first one is the look at the data before training
                signal.raise_signal(signal.SIGTERM)
            return x

    state, alone, model = tmp_path / "state", net(), net()
    train(alone, config(epochs=2), few, few)
    model.append(Stops())
    with pytest.raises(Interrupted, match="in epoch 1 after 4 of 8 steps"):
        train(model, config(epochs=2), few, few, state_path=state)
    kept = State.load(state)
    assert (kept.epoch, kept.step) == (0, 4)
    again = net()
    events: list[Event] = []
    train(again, config(epochs=2), few, few, state_path=state, resume=True, on_event=events.append)
    assert_same(alone, again)
    assert [type(e) for e in events[:2]] == [StartEvent, EpochEvent]


def test_without_a_state_an_interruption_just_ends_the_run(few: ImageSet) -> None:
    before = signal.getsignal(signal.SIGINT)  # started in the background, it is ignored
    with pytest.raises(Interrupted) as caught:
        train(net(), config(), few, on_event=StopAt(2))
    assert caught.value.exit_code == 130
    assert caught.value.hint is None
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_resumes_to_its_end(few: ImageSet, tmp_path: Path) -> None:
    first, again = net(), net()
    train(first, config(ema=0.9), few, state_path=tmp_path / "state")
    result = train(again, config(ema=0.9), few, state_path=tmp_path / "state", resume=True)
    assert_same(first, again)
    assert len(result.history) == 3


def test_states_are_saved_every_few_steps_and_seconds(few: ImageSet, tmp_path: Path) -> None:
    def saves(**changes: Any) -> list[int]:
        events: list[Event] = []
        train(net(), config(epochs=2, **changes), few, state_path=tmp_path / "s", force=True, on_event=events.append)
        return [e.step for e in events if isinstance(e, SaveEvent)]

    assert saves() == [0, 4, 8]
    assert saves(save_every=3) == [0, 3, 4, 6, 8]
    assert saves(save_seconds=0.0) == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def test_metrics_of_a_resumed_run_are_whole(few: ImageSet, tmp_path: Path) -> None:
    path, state = tmp_path / "metrics.jsonl", tmp_path / "state"
    stop = StopAt(7)

    def both(event: Event) -> None:
        MetricsFile(path)(event)
        stop(event)

    with pytest.raises(Interrupted):
        train(net(), config(), few, state_path=state, on_event=both)
    train(net(), config(), few, state_path=state, resume=True, on_event=MetricsFile(path))
    steps = [int(m[1]) for m in re.finditer(r'"event": "step".*?"step": (\d+)', path.read_text())]
    assert steps == list(range(1, 13))


def test_an_old_state_is_not_overwritten_unasked(few: ImageSet, tmp_path: Path) -> None:
    state = tmp_path / "state"
    train(net(), config(epochs=1), few, state_path=state)
    before = state.read_bytes()
    with pytest.raises(TrainingError, match=r"state exists\n--resume goes on"):
        train(net(), config(epochs=2), few, state_path=state)
    assert state.read_bytes() == before
    train(net(), config(epochs=2), few, state_path=state, force=True)
    assert State.load(state).epoch == 2


def test_resuming_with_other_settings_names_them(few: ImageSet, tmp_path: Path) -> None:
    state = tmp_path / "state"
    train(net(), config(epochs=1), few, state_path=state)
    resume: dict[str, Any] = {"state_path": state, "resume": True}
    with pytest.raises(TrainingError, match=r"\(epochs: 1, now 2; lr: 0.05, now 0.1\)"):
        train(net(), config(epochs=2, lr=0.1), few, **resume)
    with pytest.raises(TrainingError, match="tensors of the network"):
        train(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)), config(epochs=1), few, **resume)
    with pytest.raises(TrainingError, match=r"training images: 256 .*, now 100"):
        train(net(), config(epochs=1), few.sample(100), **resume)
    with pytest.raises(TrainingError, match="validation images: null"):
        train(net(), config(epochs=1), few, few, **resume)
    with pytest.raises(TrainingError, match="teacher"):
        train(net(), config(epochs=1), few, teacher=net(), **resume)
    with pytest.raises(TrainingError, match="extra"):
        train(net(), config(epochs=1), few, extra={"pass": 2}, **resume)
    pruned = remember(net(), Origin("Sequential", history=({"method": "slim"},)))
    with pytest.raises(TrainingError, match="plans"):
        train(pruned, config(epochs=1), few, **resume)
    train(net(), config(epochs=1, log_every=3, save_every=2), few, **resume)


def test_states_that_cannot_be_resumed(few: ImageSet, tmp_path: Path) -> None:
    def resume(path: Path | None) -> None:
        train(net(), config(), few, state_path=path, resume=True)

    with pytest.raises(TrainingError, match="no state to resume"):
        resume(None)
    with pytest.raises(TrainingError, match="there is no training state"):
        resume(tmp_path / "none")
    state = tmp_path / "state"
    train(net(), config(epochs=1), few, state_path=state)
    whole = state.read_bytes()
    for damaged in (b"", b"junk", whole[: len(whole) // 2]):
        state.write_bytes(damaged)
        with pytest.raises(TrainingError, match="is not a training state"):
            resume(state)
    torch.save({"weights": torch.zeros(3)}, state)
    with pytest.raises(TrainingError, match="is not a training state"):
        resume(state)
    torch.save({"prunekit_training": 99}, state)
    with pytest.raises(TrainingError, match="newer prunekit"):
        resume(state)


def test_steps_are_reported_once_after_resuming(few: ImageSet, tmp_path: Path) -> None:
    stop, events = StopAt(3), list[Event]()
    with pytest.raises(Interrupted):
        train(net(), config(), few, state_path=tmp_path / "s", on_event=stop)
    train(net(), config(), few, state_path=tmp_path / "s", resume=True, on_event=events.append)
    steps = [e.step for e in [*stop.events, *events] if isinstance(e, StepEvent)]
    assert steps == list(range(1, 13))


def interruptions(folder: Path, *arguments: str) -> str:
    done = ended(script(ROOT / "benchmarks" / "interruptions.py", *arguments), folder)
    assert done.returncode == 0, done
    return done.stdout.decode()


def test_killed_processes_resume_to_the_same_weights(tmp_path: Path) -> None:
    assert "3 of 3 interrupted runs" in interruptions(tmp_path, "--moments=3", "--epochs=3")


def test_processes_killed_before_training_begins_say_so(tmp_path: Path) -> None:
    said = interruptions(tmp_path, "--moments=3", "--epochs=1", "--within=0")
    assert said.count("(not begun)") >= 3
    assert "3 of 3 interrupted runs" in said


@pytest.mark.slow
def test_twenty_random_moments(tmp_path: Path) -> None:
    assert "20 of 20 interrupted runs" in interruptions(tmp_path, "--moments=20")
