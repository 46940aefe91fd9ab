"""`prunekit fit` and `--max-drop`: the file in every moment, resuming, what is held out, and mistakes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunekit as pk
import schemas
from networks import gated
from prunekit import api
from prunekit.cli.app import run
from prunekit.cli.times import read_seconds
from prunekit.data import ImageSet
from prunekit.data.splits import held_out
from prunekit.errors import InputError
from prunekit.evaluation.paired import Drop
from prunekit.report.pages.fitting import fit_chart
from prunekit.workflows.fitting import search
from prunekit.workflows.fitting.holding_out import HeldOut, halves, hold_out
from prunekit.workflows.fitting.outcome import outcome

Capture = pytest.CaptureFixture[str]
GOAL = ["--data", "digits", "--max-drop", "5%", "--confidence", ".9", "--calibration", "64"]
EASY = ["--methods", "merge", "--max-drop", "40%"]  # which the first trial meets


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that knows the digits."""
    path = tmp_path_factory.mktemp("fit") / "net.pt"
    torch.manual_seed(0)  # a test's own comes after this
    model = pk.load("prunekit:vgg_digits", arch_args={"config": "16-M-24"})
    pk.train(model, pk.TrainConfig(epochs=4, lr=0.1, device="cpu"), pk.open_data("digits", "train"))
    pk.save(model, path)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fitted(capsys: Capture, network: Path, *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["fit", str(network), *GOAL, "-o", "small.pt", "--json", *flags]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    schemas.check(found)
    return found


def refused(capsys: Capture, *arguments: str) -> str:
    capsys.readouterr()
    assert run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_the_file_has_the_network_and_its_drop_is_what_others_measure(network: Path, capsys: Capture) -> None:
    found = fitted(capsys, network, "--methods", "merge")
    before, after = (pk.evaluate(pk.load(path), pk.open_data("digits", "test")) for path in (network, "small.pt"))
    assert before.accuracy is not None
    assert after.accuracy is not None
    assert found["drop"]["share"] == pytest.approx(before.accuracy - after.accuracy)
    assert found["after"]["macs"] == after.macs == found["chosen"]["cost"]["macs"]
    assert found["after"]["macs"] < found["before"]["macs"]
    val = [pk.evaluate(pk.load(path), pk.open_data("digits", "val")).accuracy or 0 for path in (network, "small.pt")]
    assert found["chosen"]["drop"]["share"] == pytest.approx(val[0] - val[1])
    assert found["chosen"]["bound"] <= 0.05
    assert not Path("small.fit.json").exists()


def test_the_table_the_picture_and_the_page_show_what_was_tried(network: Path, capsys: Capture) -> None:
    views = ["--picture", "fit.png", "--html", "fit.html"]
    assert run(["fit", str(network), *GOAL, "-o", "small.pt", *views]) == 0
    out, err = capsys.readouterr()
    assert out == "small.pt\n"
    assert "178 validation images decide, 355 test images report" in err
    assert "merge:widths=measured to 70 % of the MACs" in err
    assert "of 355 images that did not decide (at most" in err
    page = Path("fit.html").read_text(encoding="utf-8")
    assert '<td class="t">merge:widths=measured to 70 % of the MACs</td>' in page
    assert '<td class="t">chosen</td>' in page
    assert Path("fit.png").stat().st_size > 1000


def stopping_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the search be interrupted in the surgery after `count` ones; return what was asked of all."""
    asked: list[str] = []
    prune: Callable[..., Any] = api.prune

    def counted(name: str, model: nn.Module, x: Any, config: Any, **rest: Any) -> Any:
        if len(asked) == count:
            raise KeyboardInterrupt
        asked.append(f"{name} {config.target_macs}")
        return prune(name, model, x, config, **rest)

    monkeypatch.setattr(search.api, "prune", counted)
    return asked


def test_an_interrupted_search_keeps_its_best_and_repeats_nothing(
    here: Path, network: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fitted(capsys, network)
    Path("small.pt").unlink()
    asked = stopping_after(3, monkeypatch)
    command = ["fit", str(network), *GOAL, "-o", "small.pt"]
    assert run(command) == 130
    assert "small.pt has the smallest so far" in capsys.readouterr().err
    kept = json.loads(Path("small.fit.json").read_text())
    best = min(trial["cost"]["macs"] for trial in kept["trials"] if trial["met"])
    assert pk.evaluate(pk.load("small.pt")).macs == best
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert "--resume goes on with it" in refused(capsys, *command)
    assert "other calibration (64 there, 65 now)" in refused(capsys, *command, "--resume", "--calibration", "65")
    later = stopping_after(99, monkeypatch)
    found = fitted(capsys, network, "--resume")
    assert not set(asked) & set(later)

    def plain(document: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**trial, "seconds": 0} for trial in document["trials"]]

    assert plain(found) == plain(whole)
    assert found["after"] == whole["after"]
    assert not Path("small.fit.json").exists()


def test_an_interrupt_before_anything_is_found_says_so(
    here: Path, network: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["merge", str(network), *GOAL, "-o", "small.pt"]
    stopping_after(0, monkeypatch)
    assert run(["fit", *command[1:]]) == 130
    assert "before anything met the goal" in capsys.readouterr().err
    assert list(here.iterdir()) == []
    assert run(command) == 130
    assert "nothing was written" in capsys.readouterr().err


def test_an_unfinished_search_is_not_lost(network: Path, capsys: Capture) -> None:
    Path("small.fit.json").write_text("{}")
    command = ["fit", str(network), *GOAL, "-o", "small.pt"]
    assert "--resume goes on with it" in refused(capsys, *command)
    assert "is not a search that could go on" in refused(capsys, *command, "--resume")


def test_another_file_in_the_place_of_the_best_is_not_taken_for_it(
    here: Path, network: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_after(1, monkeypatch)
    assert run(["fit", str(network), *GOAL, *EASY, "-o", "small.pt"]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(here)
    Path("small.pt").write_bytes(b"something else")
    asked = stopping_after(99, monkeypatch)
    found = fitted(capsys, network, *EASY, "--resume")
    assert asked[0] == "merge 70.0%"
    assert pk.evaluate(pk.load("small.pt")).macs == found["after"]["macs"]


def test_a_rehearsal_tries_one_candidate_and_writes_nothing(here: Path, network: Path, capsys: Capture) -> None:
    found = fitted(capsys, network, "--time", "1m", "--dry-run")
    assert found["output"] is None
    assert found["seconds"] == pytest.approx(found["trials"] * found["candidate"]["seconds"])
    assert found["epoch_seconds"] > 0
    assert list(here.iterdir()) == []


def test_a_method_takes_the_goal_in_the_place_of_a_ratio(network: Path, capsys: Capture) -> None:
    command = ["merge", str(network), *GOAL, "--min-channels", "2", "-o", "small.pt", "--json"]
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)
    schemas.check(found)
    assert {trial["way"] for trial in found["fit"]["trials"]} == {"merge:min-channels=2"}
    assert found["after"]["macs"] == found["fit"]["after"]["macs"] == pk.evaluate(pk.load("small.pt")).macs
    again = ["merge", str(network), "--data", "digits", "--calibration", "64", "--min-channels", "2"]
    share = f"{found['fit']['chosen']['share']:.1%}"
    assert run([*again, "--target-macs", share, "-o", "same.pt", "-q"]) == 0
    pairs = zip(pk.load("small.pt").parameters(), pk.load("same.pt").parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-drop", "0"], "between 0 and 100%"),
        (["--max-drop=-1%"], "max-drop"),
        (["--max-drop", "1%", "--time", "soon"], "is no time"),
        (["--max-drop", "1%", "-o", "-"], "kept in a file"),
        (["--max-drop", "1%", "--methods", "manidp"], "gates"),
        (["--max-drop", "1%", "--confidence", "95"], "between 0.5 and 1"),
        (["--max-drop", "1%"], "at least 268 held-out images are needed"),
        ([], "no goal given"),
    ],
)
def test_mistakes_are_told(flags: list[str], said: str, network: Path, capsys: Capture) -> None:
    assert said in refused(capsys, "fit", str(network), "--data", "digits", *flags)


def test_a_goal_out_of_reach_leaves_nothing_behind(
    here: Path, network: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "drop_between", lambda *_: Drop(178, lost=20, gained=3))
    said = refused(capsys, "fit", str(network), *GOAL, "-o", "small.pt")
    assert "no network was found" in said
    allowed = re.search(r"allow ([\d.]+)%", said)
    shown = re.search(r"at most ([\d.]+)%\n", said)
    assert allowed
    assert shown
    assert float(allowed[1]) >= float(shown[1])
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ratio", ".5"], "--max-drop says how much goes, and so does --ratio"),
        (["--epochs", "3"], "prunekit fit --time"),
    ],
)
def test_a_method_takes_one_goal(flags: list[str], said: str, network: Path, capsys: Capture) -> None:
    assert said in refused(capsys, "merge", str(network), "--data", "digits", "--max-drop", "5%", *flags)


def test_a_drop_needs_labelled_images(network: Path, capsys: Capture) -> None:
    for name in ("fit", "slim"):
        assert "no data given" in refused(capsys, name, str(network), "--max-drop", "1%")


def test_gates_are_told() -> None:
    test = pk.open_data("digits", "test")
    with pytest.raises(InputError, match="gates cannot be fitted"):
        pk.fit(gated("prunekit:vgg_digits", 8, channels=1), test, pk.DropGoal(0.05, 0.9))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert read_seconds(text) == seconds


def digits() -> tuple[ImageSet, HeldOut[ImageSet]]:
    """The training digits, and those held out."""
    train, val, test = (pk.open_data("digits", split) for split in ("train", "val", "test"))
    return train, hold_out(val, test)


def rows(images: ImageSet) -> set[bytes]:
    """The images of a set, as bytes."""
    return {bytes(image.numpy()) for image in torch.as_tensor(images.images[torch.arange(len(images))])}


def numbered(split: str, first: int, count: int, **more: Any) -> ImageSet:
    """A set of images that all differ, two of each class in turn."""
    pixels = torch.arange(first, first + count, dtype=torch.int32).view(torch.uint8).reshape(count, 1, 2, 2)
    labels, classes = torch.arange(count) // 2 % 3, ("a", "b", "c")
    return ImageSet("numbered", split, pixels.clone(), labels, classes, pk.InputSpec((1, 2, 2)), **more)


def test_validation_images_of_their_own_decide() -> None:
    val, test = numbered("val", 100, 30), numbered("test", 200, 24)
    held = hold_out(val, test)
    assert held.decide is val
    assert held.report is test


def test_validation_images_from_training_do_not_decide() -> None:
    val, test = numbered("val", 100, 12, held_out=True), numbered("test", 200, 24)
    held = hold_out(val, test)
    decide, report = rows(held.decide), rows(held.report)
    assert decide | report == rows(test)
    assert not decide & report
    assert torch.bincount(held.decide.labels).equal(torch.bincount(held.report.labels))
    assert "half of each class" in held.said


def test_test_images_that_are_the_validation_images_are_halved() -> None:
    val = numbered("val", 100, 30)
    held = hold_out(val, dataclasses.replace(numbered("test", 100, 30)))
    assert not rows(held.decide) & rows(held.report)


def test_as_many_training_images_as_test_images_are_no_heap() -> None:
    """Of ten images a class to train on and ten to test on, one a class is left out of training."""
    whole, test = numbered("train", 0, 60), numbered("test", 100, 60)
    tenth = held_out(whole.labels, "val", name="whole")
    held = hold_out(dataclasses.replace(whole.subset(tenth), held_out=True), test)
    assert rows(held.decide) | rows(held.report) == rows(test)


def test_of_one_heap_no_training_image_is_held_out() -> None:
    heap = numbered("test", 0, 60)
    rest, tenth = (held_out(heap.labels, part, name="heap") for part in ("train", "val"))
    val = dataclasses.replace(heap.subset(tenth), split="val", held_out=True)
    train = heap.subset(rest)
    held = hold_out(val, heap)
    assert not (rows(held.decide) | rows(held.report)) & rows(train)
    assert not rows(held.decide) & rows(held.report)


def test_halves_by_a_seed_differ_and_are_even() -> None:
    images = numbered("test", 0, 60)
    for seed in range(3):
        one, other = halves(images, seed)
        assert torch.bincount(one.labels).equal(torch.bincount(other.labels))
        assert rows(one) != rows(halves(images, seed + 1)[0])


def test_one_image_of_each_class_is_too_little() -> None:
    with pytest.raises(InputError, match="no two images of a class"):
        halves(numbered("test", 0, 60).subset([0, 2, 4]))


def test_no_image_that_decides_is_restored_from(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    prune: Callable[..., Any] = api.prune

    def listening(*given: Any, images: Any, **rest: Any) -> Any:
        seen.append(images)
        return prune(*given, images=images, **rest)

    monkeypatch.setattr(search.api, "prune", listening)
    train, held = digits()
    pk.fit(pk.load(network), held.decide, pk.DropGoal(0.05, 0.9), train_set=train, calibration=64)
    read = {bytes(image.numpy()) for images in seen for image in images}
    assert len(read) == 64
    known = train.inputs()
    assert read <= {bytes(image.numpy()) for image in known}
    for part in (held.decide, held.report):
        assert not read & {bytes(image.numpy()) for image in part.inputs()}


def test_the_chart_has_the_goal_the_frontier_and_the_choice(network: Path) -> None:
    model, (train, held) = pk.load(network), digits()
    done = pk.fit(model, held.decide, pk.DropGoal(0.05, 0.9), train_set=train, calibration=64)
    chart = fit_chart(outcome(done, model, held, "net.pt", "digits"))
    names = [series.name for series in chart.series]
    assert names == ["frontier", "merge:widths=measured", "slim", "chosen"]
    assert done.original.accuracy is not None
    assert done.trial.cost is not None
    assert chart.references[0].value == pytest.approx(100 * (done.original.accuracy - 0.05))
    assert [point.x for point in chart.series[-1].points] == [done.trial.cost.macs]
    edge = [(point.x, point.y) for point in chart.series[0].points]
    assert edge == sorted(edge)
    assert all(point.y - point.spread >= chart.references[0].value - 1e-9 for point in chart.series[-1].points)
