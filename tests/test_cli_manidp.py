"""`prunekit manidp` and `eval` of networks with gates, from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit as pk
import schemas
from processes import command, together
from prunekit.cli.app import run

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: object) -> dict[str, Any]:
    """The checked document of a command that succeeds."""
    assert run([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    schemas.check(found)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.pt`, and `gated.pt` made from it."""
    place = tmp_path_factory.mktemp("manidp")
    common = ["--data", "digits", "--batch-size", "64", "--device", "cpu", "-q"]
    arch = ["--arch", "vgg_digits", "--arch-args", "config=16-16-M-24"]
    assert run(["train", *arch, "--epochs", "2", *common, "-o", str(place / "model.pt")]) == 0
    gated = [str(place / "model.pt"), "--epochs", "3", "--keep", "0.6", *common, "-o", str(place / "gated.pt")]
    assert run(["manidp", "train", *gated]) == 0
    return place


def test_train(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "again.pt"
    options = ["--data", "digits", "--batch-size", 64, "--epochs", 3, "--keep", 0.6, "--device", "cpu"]
    found = call(capsys, "manidp", "train", folder / "model.pt", *options, "-o", target)
    assert target.read_bytes() == (folder / "gated.pt").read_bytes()  # one seed, one file
    assert 0.4 < found["kept"] < 0.9
    assert 0 < found["baseline_accuracy"] <= 1
    events = [json.loads(line) for line in target.with_suffix(".metrics.jsonl").read_text().splitlines()]
    assert events[-2]["event"] == "epoch"
    assert set(events[-2]["figures"]) == {"kept", "macs"}


def test_dry_run_shows_which_layers(folder: Path, capsys: Capture) -> None:
    before = sorted(folder.iterdir())
    found = call(capsys, "manidp", "train", folder / "model.pt", "--data", "digits", "--dry-run")
    assert found["layers"] == {"features.3": 16, "features.7": 24}
    assert found["left"] == {"features.0": "the stem"}
    assert run(["manidp", "train", str(folder / "model.pt"), "--data", "digits", "--dry-run"]) == 0
    assert "features.3" in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before


def test_calibrate_then_eval(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "half.pt"
    found = call(
        capsys, "manidp", "calibrate", folder / "gated.pt", "--data", "digits",
        "--target-macs", "50%,60%", "--buckets", 2, "-o", target,
    )  # fmt: skip
    dense = found["dense_macs"]
    assert found["budgets"]["60%"]["realised"] == pytest.approx(0.6 * dense, rel=0.01)
    assert len(found["buckets"]["macs"]) == 2
    table = tmp_path / "images.csv"
    common = ["--data", "digits", "--threads", 1]
    one = call(capsys, "eval", target, *common, "--budget", "60%", "--runtime", "buckets", "--per-image", table)
    gates = one["gates"]
    assert gates["macs"]["mean"] == pytest.approx(0.6 * dense, rel=0.03)
    assert gates["runtime"] == "buckets"
    assert set(gates["runtimes_ms"]) == {"dense", "masked", "gather", "buckets"}
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == one["images"]
    mean = sum(float(row["macs"]) for row in rows) / len(rows)
    assert mean == pytest.approx(gates["macs"]["mean"], rel=1e-4)
    right = sum(int(row["correct"]) for row in rows) / len(rows)
    assert right == pytest.approx(gates["masked_accuracy"])
    assert run(["eval", str(target), str(folder / "model.pt"), "--data", "digits", "--no-latency"]) == 0
    shown = capsys.readouterr().out
    assert "never on" in shown
    assert "features.7" in shown


def test_compare_shows_what_images_cost(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "half.pt"
    budgets = ["--target-macs", "50%,60%", "-o", target]
    dense = call(capsys, "manidp", "calibrate", folder / "gated.pt", "--data", "digits", *budgets)["dense_macs"]
    common = ["--data", "digits", "--no-latency"]
    plain, first, named = call(capsys, "compare", folder / "model.pt", target, f"{target}@60%", *common)["results"]
    assert (plain["runtime"], first["runtime"]) == ("pytorch", "masked")
    assert (first["gates"]["budget"], named["gates"]["budget"]) == ("50%", "60%")
    for result, share in ((first, 0.5), (named, 0.6)):
        assert result["macs"] - result["gates"]["gate_macs"] == pytest.approx(share * dense, rel=0.03)
    general = call(capsys, "compare", folder / "model.pt", target, "--budget", "60%", *common)["results"][1]
    assert general["accuracy"] == named["accuracy"]
    assert call(capsys, "compare", target, "--no-latency")["results"][0]["macs"] > dense
    assert run(["compare", str(folder / "model.pt"), str(target), "--no-latency"]) == 0
    assert "needs --data" in capsys.readouterr().err


def test_inspect_says_that_nothing_can_be_removed(folder: Path, capsys: Capture) -> None:
    found = call(capsys, "inspect", folder / "gated.pt")
    assert {group["removable"] for group in found["groups"]} == {0}
    assert any("prunekit manidp prune-static" in reason for reason in found["frozen"])


def test_methods_name_it(capsys: Capture) -> None:
    found = {one["name"]: one for one in call(capsys, "methods")["methods"]}
    assert "--keep" in {setting["flag"] for setting in found["manidp"]["settings"]}


def test_calibrate_with_foresight(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["manidp", "calibrate", folder / "gated.pt", "--data", "digits", "--target-macs", "60%"]
    found = call(capsys, *arguments, "--foresee", 1, "-o", tmp_path / "foreseen.pt")
    assert found["foresee"] == 1
    gates = call(capsys, "eval", tmp_path / "foreseen.pt", "--data", "digits", "--no-latency")["gates"]
    assert gates["macs"]["mean"] == pytest.approx(0.6 * found["dense_macs"], rel=0.03)
    assert run([*map(str, arguments), "--foresee", "-1", "-o", str(tmp_path / "none.pt")]) == 2
    assert not (tmp_path / "none.pt").exists()


def test_report_is_one_page_with_its_pictures(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "gates.html"
    arguments = ["--data", "digits", "-o", page, "--pictures", tmp_path / "charts"]
    found = call(capsys, "manidp", "report", folder / "gated.pt", *arguments)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 24
    assert "<script" not in text
    assert text.count("<svg") == 3
    assert "thresholds of no stored budget" in text
    assert "before the gates" in text  # the accuracy, as a line in the chart
    assert {path.name for path in (tmp_path / "charts").iterdir()} == {"macs.png", "sweep.png", "difficulty.png"}
    costs = [point["macs"] for point in found["sweep"]]
    assert costs == sorted(costs, reverse=True)
    assert all(-1 <= value <= 1 for value in found["alignment"].values())
    assert run(["manidp", "report", str(folder / "gated.pt"), "--data", "digits", "-o", str(page)]) == 2
    assert "exists" in capsys.readouterr().err


def test_prune_static(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    low = tmp_path / "low.pt"
    call(capsys, "manidp", "calibrate", folder / "gated.pt", "--data", "digits", "--target-macs", "40%", "-o", low)
    found = call(capsys, "manidp", "prune-static", low, "--data", "digits", "-o", tmp_path / "static.pt")
    assert 0 < found["removed"] <= found["never_kept"]
    assert found["after"]["params"] < found["before"]["params"]
    before = pk.evaluate(pk.load(low), pk.open_data("digits", "train"))
    after = pk.evaluate(pk.load(tmp_path / "static.pt"), pk.open_data("digits", "train"))
    assert after.accuracy == pytest.approx(before.accuracy, abs=2e-3)


def test_two_processes_train_as_one(folder: Path, tmp_path: Path) -> None:
    """Statistics and thresholds are those of all images, whoever saw them. (Similarity compares within a process.)"""
    common = ["--data", "digits", "--batch-size", "64", "--epochs", "2", "--device", "cpu", "-q", "--no-similarity"]
    training = ["manidp", "train", str(folder / "model.pt"), *common, "--sync-bn", "-o"]
    assert run([*training, str(tmp_path / "by-1.pt")]) == 0
    for done in together(command(*training, "by-2.pt"), tmp_path):
        assert done.returncode == 0, done.stderr
    alone, both = (pk.load(tmp_path / f"by-{processes}.pt").state_dict() for processes in (1, 2))
    for name, one in alone.items():
        assert torch.allclose(one.float(), both[name].float(), rtol=1e-2, atol=1e-3), name


WRONG: dict[str, tuple[list[str], str]] = {
    "no gates to calibrate": (
        ["manidp", "calibrate", "{model}", "--data", "digits", "--target-macs", "50%"], "has no gates"
    ),
    "nothing to calibrate": (["manidp", "calibrate", "{gated}", "--data", "digits"], "nothing to calibrate"),
    "budget out of range": (
        ["manidp", "calibrate", "{gated}", "--data", "digits", "--target-macs", "200%"], "between 0 and"
    ),
    "budget too small": (
        ["manidp", "calibrate", "{gated}", "--data", "digits", "--target-macs", "1%"], "the nearest found is"
    ),
    "too few images": (
        ["manidp", "calibrate", "{gated}", "--data", "digits", "--target-macs", "50%", "--images", "9"],
        "too few to set thresholds by: 9 images",
    ),
    "gates twice": (["manidp", "train", "{gated}", "--data", "digits"], "has gates already"),
    "no data": (["manidp", "train", "{model}"], "no data given"),
    "nothing to gate": (
        ["manidp", "train", "prunekit:lenet_300_100", "--data", "digits", "--input-size", "1x28x28"],
        "no layer of this network can have a gate",
    ),
    "keep out of range": (["manidp", "train", "{model}", "--data", "digits", "--keep", "0"], "--keep must be"),
    "runtime without gates": (["eval", "{model}", "--runtime", "gather"], "networks with gates"),
    "unknown budget": (["eval", "{gated}", "--budget", "7%"], "no budget '7%'"),
    "unknown budget of one": (["compare", "{model}", "{gated}@7%"], "gated.pt@7%: no budget '7%'"),
    "budget without gates": (["compare", "{model}", "--budget", "7%"], "networks with gates"),
    "budget of one without gates": (["compare", "{model}@7%"], "has no gates"),
    "unknown runtime": (["eval", "{gated}", "--runtime", "warp"], "unknown runtime"),
    "buckets without a table": (["eval", "{gated}", "--runtime", "buckets"], "no static sub-networks"),
    "images without data": (["eval", "{gated}", "--per-image", "x.csv"], "--per-image needs"),
    "slim": (["slim", "{gated}", "--ratio", "0.5"], "networks without gates"),
    "unknown command": (["manidp", "calibrat"], "did you mean calibrate"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_said(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG[case]
    before = sorted(folder.iterdir())
    places = {"model": folder / "model.pt", "gated": folder / "gated.pt"}
    assert run([argument.format(**places) for argument in arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert sorted(folder.iterdir()) == before
    assert not list(tmp_path.iterdir())
