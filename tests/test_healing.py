"""Healing: a pruned network comes closer to its original, never gets worse, and says why where it cannot."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import prunekit as pk
from prunekit.cli.app import run as cli
from prunekit.errors import InputError, Interrupted, PrunekitError, TrainingError
from prunekit.healing import norms
from prunekit.healing.answered import answered, image_set, parted
from prunekit.healing.mixing import MixedImages
from prunekit.healing.pace import epochs_within
from prunekit.spec import origin_of
from prunekit.training.events import Event, StepEvent


@functools.cache
def original() -> nn.Module:
    model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
    pk.train(model, pk.TrainConfig(epochs=4, lr=0.1, device="cpu"), pk.open_data("digits", "train"))
    return model.eval()


@functools.cache
def pruned() -> nn.Module:
    return pk.slim(original(), ratio=0.5, restore="none").model


@functools.cache
def few() -> pk.ImageSet:
    return pk.open_data("digits", "train").sample(200)


def settings(**changes: Any) -> pk.HealConfig:
    return pk.HealConfig(**{"epochs": 6, "batch_size": 16, "device": "cpu", **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli([*arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def right(model: nn.Module) -> float:
    return pk.evaluate(model, pk.open_data("digits", "test")).accuracy or 0.0


@pytest.mark.parametrize("given_as", ["set", "tensor", "batches"])
def test_it_learns_without_labels_and_leaves_what_it_was_given(given_as: str) -> None:
    wrong = few().labels.roll(1)
    unlabelled = pk.ImageSet("x", "train", few().images, wrong, few().classes, few().input_spec, "shift")
    images: Any = {
        "set": lambda: unlabelled,
        "tensor": lambda: few().inputs(),
        "batches": lambda: [x for x, _ in few().batches(32)],
    }[given_as]()
    small, teacher = weights(pruned()), weights(original())
    healed = pk.heal(pruned(), original(), images, settings(epochs=20))
    assert (same(pruned(), small), same(original(), teacher)) == (True, True)
    assert healed.after > healed.before
    assert right(healed.model) > right(pruned()) + 0.1
    assert healed.images == (180, 20)
    origin = origin_of(healed.model)
    assert origin is not None
    assert origin.history[-1]["method"] == "heal"
    assert origin.classes == origin_of(pruned()).classes  # type: ignore[union-attr]


def test_a_ruinous_rate_does_no_harm() -> None:
    healed = pk.heal(original(), original(), few(), settings(lr=3.0, epochs=1))
    assert (healed.before, healed.after) == (1.0, 1.0)
    assert same(healed.model, weights(original()))


def test_a_loss_that_is_no_number_keeps_the_best_and_says_the_step() -> None:
    healed = pk.heal(pruned(), original(), few(), settings(lr=1e30))
    assert healed.after == healed.before
    assert healed.stopped is not None
    assert "no number" in healed.stopped
    assert "step" in healed.stopped
    assert same(healed.model, weights(pruned()))


def test_a_loss_that_becomes_no_number_keeps_what_was_learnt_till_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of the fourth epoch are broken: three have made the network better, and stay."""
    views, calls = MixedImages.views, [0]

    def broken(data: MixedImages, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        for images, labels in views(data, *arguments, **options):
            yield images * (float("nan") if calls[0] == 4 else 1.0), labels

    monkeypatch.setattr(MixedImages, "views", broken)
    monkeypatch.setattr("prunekit.healing.task.seconds_of_a_step", lambda *_: 1e-3)
    healed = pk.heal(pruned(), original(), few(), settings(lr=0.02))
    steps = 256 // 16  # an epoch takes few images several times; steps count from 0
    assert f"no number at step {3 * steps} (epoch 4" in (healed.stopped or "")
    assert healed.after > healed.before
    assert all(bool(torch.isfinite(value).all()) for value in healed.model.state_dict().values())


def test_a_stopped_run_goes_on_to_the_same_network(tmp_path: Path) -> None:
    config, path = settings(epochs=2, lr=0.01), tmp_path / "run.heal"
    alone = pk.heal(pruned(), original(), few(), config)

    def stop(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 9:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        pk.heal(pruned(), original(), few(), config, state_path=path, on_event=stop)
    again = pk.heal(pruned(), original(), few(), config, state_path=path, resume=True)
    assert same(again.model, weights(alone.model))
    with pytest.raises(TrainingError, match="no training state"):
        pk.heal(pruned(), original(), few(), config, state_path=tmp_path / "none", resume=True)


def test_the_clock_ends_it_with_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.healing import task, watch

    now = [0.0]

    def slow(*_: object) -> float:
        return 1e-9  # planned for far more than there is time for

    def clock() -> float:
        now[0] += 0.05
        return now[0]

    monkeypatch.setattr(task, "seconds_of_a_step", slow)
    monkeypatch.setattr(watch.time, "perf_counter", clock)
    healed = pk.heal(pruned(), original(), few(), settings(epochs=50, seconds=2.0))
    assert healed.epochs == 50
    assert "time was over" in (healed.stopped or "")
    assert healed.after >= healed.before


def one_class() -> Tensor:
    return few().inputs()[answered(original(), few()).labels == 3]


def other(**arguments: Any) -> nn.Module:
    return pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16", **arguments}).eval()


CASES: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "one class": (lambda: (pruned(), original(), one_class()), "with one class, '3'"),
    "other classes": (lambda: (pruned(), other(num_classes=7), few()), "knows 7 classes, and the pruned network 10"),
    "other input": (lambda: (pruned(), pk.load("prunekit:resnet20"), few()), "the original reads images of 3x32x32"),
    "one image": (lambda: (pruned(), original(), few().inputs()[:1]), "at least two images"),
    "no numbers": (lambda: (pruned(), original(), few().inputs() * float("nan")), "not finite"),
    "no time": (lambda: (pruned(), original(), few(), settings(seconds=1e-6)), "too short to heal"),
    "zero time": (lambda: (pruned(), original(), few(), settings(seconds=0.0)), "0 seconds are none"),
    "no epochs": (lambda: (pruned(), original(), few(), settings(epochs=0)), "epochs must be at least 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_healed_is_said(case: str) -> None:
    arguments, said = CASES[case]
    with pytest.raises(PrunekitError, match=said) as caught:
        pk.heal(*arguments())
    assert isinstance(caught.value, InputError)


@given(st.integers(0, 2**31), st.integers(2, 30), st.floats(0.01, 10))
def test_images_come_back_from_a_set_as_they_were(seed: int, count: int, scale: float) -> None:
    images = scale * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 1
    back = image_set(images).inputs()
    step = (images.amax((0, 2, 3)) - images.amin((0, 2, 3))) / 255
    assert bool(((back - images).abs() <= 0.51 * step[:, None, None] + 1e-5 * scale).all())


@given(st.integers(2, 40), st.integers(1, 16), st.integers(0, 2**31))
def test_a_mixed_view_is_nearer_to_its_image_than_to_the_other_one(count: int, batch: int, seed: int) -> None:
    """Image `i` is all of value `i` here, so that a view tells its partner's share."""
    pixels = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).to(torch.uint8)
    plain = pk.ImageSet("x", "train", pixels, torch.arange(count), ("",) * count, pk.InputSpec((1, 4, 4)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    mixed = MixedImages.of(plain)
    found = list(mixed.views(batch, order, seed=(seed, 0)))
    views, labels = torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])
    assert torch.equal(labels, order)
    means = 255 * views.mean((1, 2, 3))
    # a mean of two of 0 .. count - 1, at least half of which is the image
    assert bool((means >= order / 2 - 1e-3).all())
    assert bool((means <= (order + count - 1) / 2 + 1e-3).all())
    assert count < 8 or bool(((means - order).abs() > 1e-3).any())
    # the same in batches of another size, and in another order, as when a run is resumed
    again = torch.cat([x for x, _ in mixed.views(batch + 1, order.flip(0), seed=(seed, 0))]).flip(0)
    assert torch.equal(views, again)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=90))
def test_a_tenth_is_held_out_of_all_classes(labels: list[int]) -> None:
    count = len(labels)
    data = pk.ImageSet(
        "x", "train", torch.arange(count).view(-1, 1, 1, 1).to(torch.uint8), torch.tensor(labels), tuple("abcde"),
        pk.InputSpec((1, 1, 1)),
    )  # fmt: skip
    on, held_out = parted(data)
    numbers = torch.cat([part.images[torch.arange(len(part))].flatten() for part in (on, held_out)])
    assert sorted(numbers.tolist()) == list(range(count))
    assert len(held_out) == max(1, count // 10)


@given(st.floats(1, 1e4), st.floats(0, 100), st.floats(1e-3, 10), st.integers(1, 5000), st.integers(1, 128))
def test_what_is_planned_fits_into_the_time(seconds: float, ready: float, step: float, images: int, batch: int) -> None:
    batch = min(batch, images)
    try:
        epochs, count = epochs_within(seconds, ready, step, images, batch)
    except InputError:
        assert 0.85 * (seconds - ready) < step
        return
    assert epochs >= 1
    assert batch <= count <= images
    assert epochs * (count // batch) * step <= seconds - ready


def test_statistics_move_as_far_as_they_move_on_the_images() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3)).eval()
    flat = torch.zeros(3), torch.ones(3)
    before = {"0": (torch.tensor([1.0, 2, 3]), 4 * torch.ones(3))}
    norms.move(net, before, {"0": flat}, {"0": (torch.ones(3), 2.25 * torch.ones(3))})
    eps = net[0].eps
    scale = (4 + eps) / (1 + eps)
    torch.testing.assert_close(net[0].running_mean, before["0"][0] + scale**0.5)
    torch.testing.assert_close(net[0].running_var, torch.full((3,), (2.25 + eps) * scale - eps))
    norms.move(net, before, {"0": flat}, {"0": flat})
    torch.testing.assert_close(net[0].running_mean, before["0"][0])
    torch.testing.assert_close(net[0].running_var, before["0"][1])


def test_labels_are_the_answers_of_the_original() -> None:
    labelled = answered(original(), few())
    with torch.no_grad():
        assert torch.equal(labelled.labels, original()(few().inputs()).argmax(1))
    assert labelled.classes == few().classes


def test_the_command_heals_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "m.pt", tmp_path / "small.pt"
    pk.save(original(), source)
    flags = ("--ratio", "0.5", "--restore", "none", "--data", "digits", "--calibration", "200", "--heal", "--heal-time")
    code, out, err = command(capsys, "slim", str(source), *flags, "3s", "-o", str(target))
    assert (code, out) == (0, f"{target}\n"), err
    assert "agrees with the original on" in err
    assert right(pk.load(target)) > right(pruned())
    assert not target.with_suffix(".heal").exists()
    code, out, _ = command(capsys, "slim", str(source), *flags, "3s", "-o", str(target), "--force", "--json")
    assert code == 0
    healing = json.loads(out)["healing"]
    assert healing["agreement"]["after"] >= healing["agreement"]["before"]
    assert (healing["images"], healing["held_out"]) == (180, 20)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--heal",), "healing needs images"),
        (("--heal", "--heal-time", "soon"), "--heal-time 'soon' is no time"),
        (("--heal", "--epochs", "2", "--data", "digits"), "--heal and --epochs"),
        (("--heal", "--max-drop", "3%", "--data", "digits"), "searches without healing"),
        (("--resume",), "tuning needs images"),
    ],
)
def test_flags_that_do_not_go_together(
    tmp_path: Path, flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pk.save(original(), tmp_path / "m.pt")
    budget = () if "--max-drop" in flags else ("--ratio", "0.5")
    code, out, err = command(capsys, "slim", str(tmp_path / "m.pt"), *budget, *flags)
    assert (code, out) == (2, "")
    assert said in err


def test_a_state_in_the_way_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pk.save(original(), tmp_path / "m.pt")
    (tmp_path / "small.heal").write_bytes(b"another run")
    flags = ("--ratio", "0.5", "--data", "digits", "--heal", "-o", str(tmp_path / "small.pt"))
    code, _, err = command(capsys, "slim", str(tmp_path / "m.pt"), *flags)
    assert code == 2
    assert "holds an unfinished run" in err
    assert (tmp_path / "small.heal").read_bytes() == b"another run"
