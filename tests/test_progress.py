"""Progress of long work: who counts what, and who hears of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

import prunekit as pk
from prunekit.cli.app import run
from prunekit.data import open_data
from prunekit.progress import counter, report_progress

Count = tuple[str, int, int]


def heard(work: object) -> list[Count]:
    """The counts of calling `work`."""
    counts: list[Count] = []
    with report_progress(lambda *count: counts.append(count)):
        work()  # type: ignore[operator]
    return counts


def pieces(counts: list[Count]) -> list[str]:
    """The pieces of work, in order."""
    return list(dict.fromkeys(what for what, _, _ in counts))


def check(counts: list[Count]) -> None:
    """Each piece of work counts upwards, and not beyond its end, before another follows."""
    for (what, done, total), (then, next_done, next_total) in itertools.pairwise(counts):
        if what == then and total == next_total and next_done:
            assert next_done >= done
    assert all(done <= total or not total for _, done, total in counts)


def test_counts_go_to_the_nearest_listener_and_nowhere_without() -> None:
    count = counter("work")
    count(0, 2)

    def nested() -> None:
        count(1, 2)
        assert heard(lambda: count(5, 6)) == [("work", 5, 6)]
        with report_progress(None):
            count(7, 8)
        count(2, 2)

    assert heard(nested) == [("work", 1, 2), ("work", 2, 2)]
    with pytest.raises(ZeroDivisionError), report_progress(print):
        raise ZeroDivisionError
    count(3, 3)  # prints nothing, see below


def test_silence_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    test_counts_go_to_the_nearest_listener_and_nowhere_without()
    pk.merge(pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"}), ratio=0.5)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("restore", "expected"),
    [
        ("moments", ["modelling activations", "ranking filters", "refitting layers", "proving"]),
        ("synthetic", ["making images", "measuring batch norms", "measuring activations", "refitting layers"]),
        ("calibrate", ["tracing", "measuring activations", "ranking filters", "refitting layers", "proving"]),
    ],
)
def test_every_restoration_counts(restore: str, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = pk.load("prunekit:resnet20")
    images = torch.randn(20, 3, 32, 32) if restore == "calibrate" else None
    counts = heard(lambda: pk.merge(model, images=images, ratio=0.5, restore=restore))
    check(counts)
    assert [what for what in pieces(counts) if what in expected] == expected


def test_measuring_counts() -> None:
    model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
    data = open_data("digits", "test")
    counts = heard(lambda: pk.evaluate(model, data, latency=True, name="net"))
    check(counts)
    assert pieces(counts) == ["tracing", "evaluating net", "warming up (percent)", "timing (percent)"]
    assert counts[-1] == ("timing (percent)", 100, 100)
    graph = pk.inspect(model).graph
    assert heard(lambda: pk.sensitivity(model, graph, data, [0.5])) == [
        ("pruning one group at a time", 1, 2),
        ("pruning one group at a time", 2, 2),
    ]


def test_reading_images_counts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("L", (8, 8), 20 * i).save(tmp_path / name / f"{i}.png")
    assert heard(lambda: open_data(tmp_path))[-1] == ("reading images", 12, 12)
    data = open_data("digits", "train").sample(100)
    assert heard(data.inputs) == [("reading images", 64, 100), ("reading images", 100, 100)]
    assert torch.equal(data.inputs(), next(data.batches(100))[0])


def test_gates_count() -> None:
    model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-8-M-16"})
    gated = pk.manidp.add_gates(model, pk.manidp.GateRecipe()).eval()
    view, digits = pk.manidp.GatedView.of(gated), open_data("digits", "train").sample(128)
    counts = heard(lambda: pk.manidp.calibrate(view, digits.batches, view.cost.dense, "all"))
    check(counts)
    assert pieces(counts) == ["measuring batch norms", "watching the gates", "setting thresholds"]


def test_a_command_shows_what_it_does_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("prunekit.report.terminal.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("prunekit.report.terminal.progress.SECONDS_BEFORE_ESTIMATES", 0.0)
    monkeypatch.chdir(tmp_path)
    command = ["merge", "prunekit:resnet20", "--ratio", "0.3", "-o", "a.pt"]
    assert run(command) == 0
    said = capsys.readouterr()
    assert "refitting layers: 3 of 5, " in said.err
    assert said.out == "a.pt\n"
    assert run([*command, "--force", "--quiet"]) == 0
    assert "refitting" not in capsys.readouterr().err
