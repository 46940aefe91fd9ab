"""Prune, tune, and again: budgets of passes, resuming, and the command line around it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit as pk
from prunekit import models
from prunekit.api import make_config
from prunekit.cli.app import run as cli
from prunekit.errors import InputError, TrainingError
from prunekit.spec import origin_of, remember
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import EpochEvent, Event
from prunekit.training.fine_tuning import cut_since_training, suited
from prunekit.workflows import passes
from prunekit.workflows.passes import PassImages, PassResult, PassSchedule, run_passes

TUNING = TrainConfig(epochs=1, batch_size=32, lr=0.02, log_every=1000)


@pytest.fixture(scope="module")
def images() -> PassImages:
    train = pk.open_data("digits", "train").sample(128, seed=0)
    test = pk.open_data("digits", "test").sample(64, seed=0)
    return PassImages(train, None, test)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build("vgg_digits")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def run(
    folder: Path, images: PassImages, iterations: int = 2, **more: object
) -> tuple[torch.nn.Module, list[PassResult]]:
    config = make_config("slim", target_macs="40%")
    return run_passes("slim", network(), config, images, PassSchedule(TUNING, iterations), folder, **more)  # type: ignore[arg-type]


def test_passes_reach_one_target_by_equal_factors(tmp_path: Path, images: PassImages) -> None:
    model, results = run(tmp_path / "steps", images)
    first, second = results
    assert first.after.macs / first.before.macs == pytest.approx(0.4**0.5, rel=0.02)
    assert second.after.macs / first.before.macs == pytest.approx(0.4, rel=0.02)
    assert second.before == first.after
    assert pk.inspect(model).cost.macs == second.after.macs
    assert all(0 <= r.score_pruned <= 1 and 0 <= r.score_tuned <= 1 for r in results)
    assert json.dumps([r.to_json() for r in results])


def test_the_last_tuning_has_no_penalty() -> None:
    schedule = PassSchedule(TrainConfig(sparsity=1e-3), iterations=2)
    assert schedule.tuning_of(1).sparsity == 1e-3
    assert schedule.tuning_of(2).sparsity == 0


def test_from_scratch_nothing_of_the_weights_is_left(tmp_path: Path, images: PassImages) -> None:
    config = make_config("slim", target_macs="40%")
    model, results = run_passes("slim", network(), config, images, PassSchedule(TUNING, scratch=True), tmp_path / "a")
    kept, _ = run_passes("slim", network(), config, images, PassSchedule(TUNING), tmp_path / "b")
    assert results[0].widths == {
        layer.name: layer.channels for layer in pk.inspect(model).cost.layers if layer.channels
    }
    assert not same(model, kept)


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_run_that_was_killed_goes_on_to_the_same_network(tmp_path: Path, images: PassImages, stop_at: int) -> None:
    whole, expected = run(tmp_path / "whole", images)
    seen = 0

    def stop(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, EpochEvent)
        if seen == stop_at:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path / "steps", images, on_event=stop)
    with pytest.raises(TrainingError, match="unfinished run"):
        run(tmp_path / "steps", images)
    again, results = run(tmp_path / "steps", images, resume=True)
    assert same(whole, again)
    assert [r.score_tuned for r in results] == [r.score_tuned for r in expected]


def test_other_settings_are_not_resumed(tmp_path: Path, images: PassImages) -> None:
    run(tmp_path / "steps", images)
    with pytest.raises(TrainingError, match="another iterations"):
        run(tmp_path / "steps", images, iterations=1, resume=True)


def test_iterations_must_be_positive(tmp_path: Path, images: PassImages) -> None:
    with pytest.raises(InputError, match="--iterations must be at least 1"):
        run(tmp_path / "steps", images, iterations=0)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli([*arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_tunes_reports_each_pass_and_cleans_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    source, target = tmp_path / "m.pt", tmp_path / "small.pt"
    pk.save(network(), source)
    code, out, err = command(
        capsys,
        *("slim", str(source), "--ratio", "0.5", "--data", "digits", "--epochs", "1", "--iterations", "2"),
        *("-o", str(target), "--json", "--pictures", str(tmp_path / "pictures")),
    )
    assert code == 0, err
    document = json.loads(out)
    assert [p["number"] for p in document["passes"]] == [1, 2]
    assert document["output"] == str(target)
    assert pk.inspect(pk.load(target)).cost.params == document["after"]["params"]
    assert not target.with_suffix(".steps").exists()
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"gammas.png", "widths.png", "passes.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--epochs", "2"), "tuning needs images"),
        (("--data", "digits", "--iterations", "2"), "need a tuning"),
        (("--data", "digits", "--calibration", "0"), "--calibration must be at least 1"),
        (("--data", "digits", "--epochs", "1", "-o", "-"), "goes to a file"),
    ],
)
def test_flags_that_do_not_go_together(
    tmp_path: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pk.save(network(), tmp_path / "m.pt")
    code, out, err = command(capsys, "slim", str(tmp_path / "m.pt"), "--ratio", "0.5", *flags)
    assert (code, out) == (2, "")
    assert message in err


@pytest.fixture(scope="module")
def trained(images: PassImages) -> torch.nn.Module:
    model = network()
    train(model, TrainConfig(epochs=8, batch_size=16, lr=0.05, augment="none", log_every=1000), images.train)
    return model


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_tuning_that_only_harms_is_undone(
    tmp_path: Path, images: PassImages, trained: torch.nn.Module, iterations: int
) -> None:
    ruinous = TrainConfig(epochs=2, batch_size=32, lr=3.0, log_every=1000)
    seen = PassImages(images.train, images.score, images.score)
    config = make_config("slim", ratio=0.1)
    _, results = run_passes("slim", trained, config, seen, PassSchedule(ruinous, iterations), tmp_path / "a")
    assert all(r.kept and r.kept["epoch"] == 0 and r.score_tuned == r.score_pruned for r in results)
    last = dataclasses.replace(ruinous, keep="last")
    _, results = run_passes("slim", trained, config, seen, PassSchedule(last, iterations), tmp_path / "b")
    assert results[0].kept is None
    assert results[0].score_tuned < results[0].score_pruned


@pytest.mark.parametrize("taught", [True, False])
def test_what_is_left_open_is_filled_in_by_the_data_and_the_cut(taught: bool) -> None:
    def filled(config: TrainConfig, images: int, cut: float) -> TrainConfig:
        return suited(config, images, cut, taught=taught)

    small, large = filled(TrainConfig(), 1264, 0.2), filled(TrainConfig(), 50_000, 0.8)
    assert (small.batch, large.batch) == (16, 128)
    assert small.peak_lr < large.peak_lr < TrainConfig().peak_lr
    assert 0 < small.warmup_epochs < large.warmup_epochs <= 1
    assert (small.keep, filled(TrainConfig(sparsity=1e-3), 1264, 0).keep) == ("best", "last")
    said = TrainConfig(batch_size=128, lr=0.02, warmup=0, augment="shift", keep="last", distill=0.1, match=0)
    assert filled(said, 1264, 0.5) == said


def test_a_teacher_is_matched_and_lets_few_images_be_varied() -> None:
    alone, taught = (suited(TrainConfig(epochs=2), 5000, 0.5, taught=taught) for taught in (False, True))
    assert (alone.augment, taught.augment) == ("none", "auto")
    assert alone.match is None
    assert taught.match
    assert taught.teacher_share > alone.teacher_share


def test_batch_and_rate_from_scratch_go_by_the_number_of_images() -> None:
    few, many = TrainConfig().suited_to(1264), TrainConfig().suited_to(50_000)
    assert (few.batch, many.batch) == (16, 128)
    assert few.peak_lr == pytest.approx(0.1 / math.sqrt(8))
    assert many.peak_lr == TrainConfig().peak_lr
    for said in (TrainConfig(batch_size=128), few):
        assert said.suited_to(1264) == said
    assert TrainConfig(lr=0.03).suited_to(1264).peak_lr == 0.03


def test_what_was_cut_since_training_is_remembered() -> None:
    model = network()
    assert cut_since_training(model) == 0
    small = pk.slim(pk.slim(model, ratio=0.3).model, ratio=0.3).model
    whole, left = pk.inspect(model).cost.macs, pk.inspect(small).cost.macs
    assert cut_since_training(small) == pytest.approx(1 - left / whole)
    origin = origin_of(small)
    assert origin is not None
    assert cut_since_training(remember(small, origin.after({"method": "train"}))) == 0


def test_the_unpruned_network_teaches_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers: list[object] = []

    def note(*arguments: Any, **_: object) -> None:
        teachers.append(arguments[4].teacher)
        raise InputError("enough seen")

    monkeypatch.setattr(passes, "run_passes", note)
    pk.save(network(), tmp_path / "m.pt")
    tune = ("slim", str(tmp_path / "m.pt"), "--ratio", "0.5", "--data", "digits", "--epochs", "1")
    for more in ((), ("--distill-share", "0"), ("--scratch",)):
        assert command(capsys, *tune, *more)[0] == 2
    assert [teacher is not None for teacher in teachers] == [True, False, False]


def test_a_ruinous_rate_is_said_and_does_no_harm(
    tmp_path: Path, trained: torch.nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "m.pt", tmp_path / "tuned.pt"
    pk.save(trained, source)
    flags = ("--data", "digits", "--epochs", "1", "--batch-size", "128", "--lr", "5", "-o", str(target))
    code, out, err = command(capsys, "train", str(source), *flags)
    assert (code, out) == (0, f"{target}\n")
    assert same(trained, pk.load(target))
    assert "validation: 178 images" in err
    assert "warning: tuning did not make the network better" in err
    assert "warning: an epoch has only 9 steps" in err
