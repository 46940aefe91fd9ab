"""Checkpoints of Ultralytics: read, pruned, and written so that its own trainer keeps the widths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import prunekit as pk
from prunekit.cli.app import run
from prunekit.errors import Noted
from prunekit.spec import origin_of

os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
ultralytics = pytest.importorskip("ultralytics", reason="needs the extra `ultralytics`")
tasks: Any = pytest.importorskip("ultralytics.nn.tasks")

pytestmark = pytest.mark.filterwarnings("default")  # the library has its own

SIDE = 64
NAMES = [
    f"{family}n{task}"
    for family in ("yolov8", "yolo11", "yolo12", "yolo26")
    for task in ("", "-seg", "-pose", "-obb", "-cls")
]
QUICK = ("yolov8n-pose", "yolo11n", "yolo26n-seg", "yolo12n-cls")


def stock(folder: Path, name: str) -> Path:
    """Write a checkpoint by Ultralytics' own code: random weights, and narrower than any of its own."""
    torch.manual_seed(0)
    described = tasks.yaml_model_load(f"{name}.yaml")
    described["scales"]["n"] = [0.33, 0.25 if "12" in name else 0.0625, 1024]  # of 12, no less will do
    described["nc"] = 3
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(described))  # YAML reads JSON
    model = ultralytics.YOLO(str(path), verbose=False)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    model.model.names = {0: "disc", 1: "square", 2: "triangle"}
    model.model.args = {**model.model.args, "imgsz": SIDE}
    model.ckpt = {"train_args": model.model.args}
    model.save(folder / f"{name}.pt")
    return folder / f"{name}.pt"


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def outputs(model: nn.Module) -> list[Tensor]:
    x = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model.eval()(x)) if isinstance(leaf, Tensor)]


def rebuilt(yolo: Any) -> Any:
    """Build the network as the stock trainer does, and load the weights that fit."""
    again = type(yolo.model)(yolo.model.yaml, ch=3, nc=3, verbose=False)
    again.load(yolo.model)
    return again


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_the_stock_trainer_builds_the_pruned_network(name: str, tmp_path: Path) -> None:
    model = pk.load(stock(tmp_path, name), trust_pickle=True)
    pruned = pk.slim(model, ratio=0.3)
    assert pruned.after.params < pruned.before.params
    pk.save(pruned.model, tmp_path / "small.pt")
    yolo = ultralytics.YOLO(tmp_path / "small.pt")
    assert (yolo.task, yolo.names[1]) == (model.task, "square")
    assert sum(p.numel() for p in yolo.model.parameters()) == sum(p.numel() for p in pruned.model.parameters())
    assert shapes(pk.load(tmp_path / "small.pt", trust_pickle=True)) == shapes(pruned.model)
    again = rebuilt(yolo)
    assert shapes(again) == shapes(yolo.model)
    for ours, stored, built in zip(outputs(pruned.model), outputs(yolo.model), outputs(again), strict=True):
        torch.testing.assert_close(stored, built, rtol=0, atol=0)
        torch.testing.assert_close(ours, stored, rtol=0.05, atol=0.05 * float(ours.abs().max()))  # half precision
    assert all(p.requires_grad for n, p in again.named_parameters() if ".dfl." not in n)


def test_a_pruned_file_is_pruned_again_under_the_same_names(tmp_path: Path) -> None:
    model = pk.load(stock(tmp_path, "yolov8n-cls"), trust_pickle=True)
    names = set(model.state_dict())
    for step in ("once", "twice"):
        small, _ = pk.slim(model, ratio=0.2)
        pk.save(small, tmp_path / f"{step}.pt")
        pk.save(small, tmp_path / "again.pt", force=True)
        assert (tmp_path / f"{step}.pt").read_bytes() == (tmp_path / "again.pt").read_bytes()
        model = pk.load(tmp_path / f"{step}.pt", trust_pickle=True)
        assert set(model.state_dict()) == names
        assert shapes(model) == shapes(small)
    origin = origin_of(model)
    assert origin is not None
    assert [entry["method"] for entry in origin.history] == ["slim", "slim"]


def test_another_suffix_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = stock(tmp_path, "yolov8n-cls")
    assert run(["slim", str(source), "--trust-pickle", "--ratio", ".3", "-o", str(tmp_path / "small.pth")]) == 2
    assert "Ultralytics reads .pt files alone" in capsys.readouterr().err


def test_a_network_that_was_not_pruned_stays_as_it_is_described(tmp_path: Path) -> None:
    model = pk.load(stock(tmp_path, "yolov8n-cls"), trust_pickle=True)
    pk.save(model, tmp_path / "same.pt")
    assert ultralytics.YOLO(tmp_path / "same.pt").model.yaml["head"][-1][2] == "Classify"


def test_it_is_refused_without_trust(tmp_path: Path) -> None:
    with pytest.raises(pk.InputError, match="asks for code") as refused:
        pk.load(stock(tmp_path, "yolov8n-cls"))
    assert "--trust-pickle" in str(refused.value.hint)


def test_a_plan_that_would_take_outputs_of_the_head_is_refused(tmp_path: Path) -> None:
    model = pk.load(stock(tmp_path, "yolo11n"), trust_pickle=True)
    with pytest.raises(pk.SurgeryError, match="output"):
        pk.apply(model, pk.Plan([pk.Keep("model.23.cv3.0.2", [0, 1])]))


def test_a_version_that_was_never_tried_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pk.load(stock(tmp_path, "yolov8n-cls"), trust_pickle=True)
    small, _ = pk.slim(model, ratio=0.3)
    monkeypatch.setattr(ultralytics, "__version__", "9.9.9")
    with pytest.warns(Noted, match=r"9\.9\.9 was never tried .*8\.4\.190"):
        pk.save(small, tmp_path / "small.pt")
    monkeypatch.delattr(tasks, "torch_load")
    with pytest.raises(pk.SurgeryError, match=r"9\.9\.9 does not build") as refused:
        pk.save(small, tmp_path / "small.pt", force=True)
    assert "tried were" in str(refused.value.hint)


@pytest.mark.slow
def test_the_command_line_and_the_stock_trainer_hand_over_to_each_other(tmp_path: Path) -> None:
    bench = Path(__file__).parents[1] / "benchmarks" / "yolo.py"
    draw = "import sys, pathlib, yolo; print(yolo.drawn(pathlib.Path(sys.argv[1]), 'detect'))"
    data = told(sys.executable, "-c", draw, str(tmp_path / "data"), cwd=bench.parent)
    source = stock(tmp_path, "yolo11n")
    command = [sys.executable, "-m", "prunekit", "slim", str(source), "--trust-pickle", "--ratio", "0.3"]
    small = told(*command, "-o", str(tmp_path / "small.pt"))
    assert small == str(tmp_path / "small.pt")
    arguments = {"source": small, "data": data, "epochs": 1, "lr0": 1e-3, "project": str(tmp_path)}
    tuned = str(tmp_path / "tuned.pt")  # the widths are checked after training
    told(sys.executable, str(bench), "--apart", "train", json.dumps({**arguments, "target": tuned}))
    row = json.loads(
        told(sys.executable, str(bench), "--apart", "measure", json.dumps({"source": tuned, "data": data}))
    )
    assert row["params"] == sum(p.numel() for p in pk.load(small, trust_pickle=True).parameters())


def told(*command: str, cwd: Path | None = None) -> str:
    """The last line that a command prints on standard output."""
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout.splitlines()[-1]
