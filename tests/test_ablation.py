"""The ablation of ManiDP: `prunekit manidp ablate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit as pk
import schemas
from prunekit.cli.app import run
from prunekit.methods.manidp.variants import AblationRow, equally_many
from prunekit.nn.gated import gated_layers
from prunekit.workflows import ablation

Capture = pytest.CaptureFixture[str]


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    settings = ["--data", "digits", "--epochs", "2", "--batch-size", "128", "--device", "cpu", "--keep", "0.7"]
    return ["manidp", "ablate", str(model), *settings, "-o", str(folder), *more]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ablation") / "model.pt"
    arch = ["--arch", "vgg_digits", "--arch-args", "config=8-8-M-16"]
    common = ["--data", "digits", "--epochs", "2", "--device", "cpu", "--batch-size", "64", "-q"]
    assert run(["train", *arch, *common, "-o", str(path)]) == 0
    return path


def test_an_ablation_goes_on_where_it_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder, made = tmp_path / "out", list[str]()
    row = ablation.Ablation.row

    def stopping(self: Any, label: str) -> AblationRow:
        if label == "similarity" and label not in made:
            made.append(label)
            raise KeyboardInterrupt
        made.append(label)
        return row(self, label)

    monkeypatch.setattr(ablation.Ablation, "row", stopping)
    assert run(arguments(model, folder)) == 130
    assert run(arguments(model, folder)) == 2  # not without --resume
    assert "--resume" in capsys.readouterr().err
    assert run(arguments(model, folder, "--resume", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    schemas.check(found)
    labels = ["dense", "both", "complexity", "similarity", "neither", "dynamic control", "static control"]
    assert [one["label"] for one in found["rows"]] == labels
    assert sorted(made) == sorted([*labels, "similarity"])  # nothing was done twice
    assert json.loads((folder / "results.json").read_text()) == found
    assert "static control" in (folder / "ablation.html").read_text()
    dense, *rest = found["rows"]
    for one in rest[:-1]:  # the dynamic control rounds to whole channels, of which there are eight
        whole = one["label"] == "dynamic control"
        assert one["macs"] == pytest.approx(0.5 * dense["macs"], rel=0.2 if whole else 0.08)
    assert rest[-1]["macs"] <= 0.5 * dense["macs"]
    assert rest[-2]["macs_p5_p95"][0] == rest[-2]["macs_p5_p95"][1]  # equally many for every image
    other = [flag if flag != "0.7" else "0.8" for flag in arguments(model, folder, "--resume")]
    assert run(other) == 2
    assert "of other gates" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["20M", "0", "150%", "half"])
def test_targets_that_are_no_share(wrong: str, model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(arguments(model, tmp_path / "out", "--target-macs", wrong)) == 2
    assert "is no share" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_targets_that_cannot_be_met_are_rows_without_figures(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(arguments(model, tmp_path / "out", "--target-macs", "0.1%", "--json")) == 0
    rows = {one["label"]: one for one in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["dense"]["accuracy"] is not None
    assert rows["both"]["accuracy"] is None
    assert "no thresholds give" in rows["both"]["error"]


def test_the_dynamic_control_leaves_the_network(model: Path) -> None:
    gated = pk.manidp.add_gates(pk.load(model), pk.manidp.GateRecipe()).eval()
    view, images = pk.manidp.GatedView.of(gated), pk.open_data("digits", "test")
    x = torch.rand(4, *images.input_spec.shape)
    before = gated(x)
    with equally_many(view, images.batches(200)):
        assert all("kept" in vars(layer) for _, layer in gated_layers(gated))
    assert torch.equal(gated(x), before)
    assert not any("kept" in vars(layer) for _, layer in gated_layers(gated))
