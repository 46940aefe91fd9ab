"""ONNX files among the networks that `eval` and `compare` measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import prunekit as pk
import schemas
from prunekit.cli.app import run
from prunekit.spec import InputSpec, Origin, remember

Capture = pytest.CaptureFixture[str]
SIDE = 8


def call(capsys: Capture, *arguments: object) -> Any:
    assert run([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    schemas.check(found)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.pt`, and its exports `free.onnx` and `fixed.onnx`, which takes batches of 4 alone."""
    place = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
    pk.save(model, place / "model.pt")
    common = ["--no-latency", "-q"]
    assert run(["export", str(place / "model.pt"), "-o", str(place / "free.onnx"), *common]) == 0
    assert run(["export", str(place / "model.pt"), "-o", str(place / "fixed.onnx"), "--fixed-batch", "4", *common]) == 0
    return place


def handmade(path: Path, shape: tuple[Any, ...] = ("n", 1, SIDE, SIDE), kind: int = TensorProto.FLOAT) -> Path:
    """A stranger's classifier, one linear layer with 8-bit weights, that says nothing about itself."""
    weight = np.random.default_rng(0).integers(-90, 90, (SIDE * SIDE, 10)).astype(np.int8)
    values = {"w": weight, "scale": np.float32(0.01), "zero": np.int8(0), "shape": np.array([0, SIDE * SIDE])}
    nodes = [
        helper.make_node("Cast", ["x"], ["images"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["images", "shape"], ["flat"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["weights"]),
        helper.make_node("MatMul", ["flat", "weights"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "stranger",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (shape[0], 10))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("batch", [3, 256])  # neither divides 355 images, nor is 3 a multiple of 4
def test_a_file_answers_as_its_network(batch: int, folder: Path, capsys: Capture) -> None:
    files = [folder / name for name in ("model.pt", "free.onnx", "fixed.onnx")]
    common = ["--data", "digits", "--mean", "0.3", "--std", "0.4", "--batch-size", batch, "--no-latency"]
    model, *exported = call(capsys, "compare", *files, *common)["results"]
    for result in exported:
        assert result["accuracy"] == model["accuracy"]
        assert result["loss"] == pytest.approx(model["loss"], abs=1e-5)
        assert (result["macs"], result["runtime"]) == (model["macs"], "onnxruntime")
        assert 0.9 * model["params"] < result["params"] <= model["params"]


def test_latency_of_a_fixed_batch_is_said(folder: Path, capsys: Capture) -> None:
    assert run(["eval", str(folder / "fixed.onnx"), "--threads", "1", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["latency_ms"]["batch"] == 4
    assert "batches of 4 alone" in shown.err


def test_tables_say_what_ran(folder: Path, capsys: Capture) -> None:
    assert run(["compare", str(folder / "model.pt"), str(folder / "free.onnx"), "--no-latency"]) == 0
    assert "ONNX Runtime" in capsys.readouterr().out
    assert run(["eval", str(folder / "free.onnx"), "--no-latency"]) == 0
    assert "ONNX Runtime" not in capsys.readouterr().out  # a column of one value says nothing


def test_a_strangers_file_is_measured_as_far_as_it_is_known(tmp_path: Path, capsys: Capture) -> None:
    path = handmade(tmp_path / "q.onnx")
    assert run(["eval", str(path), "--data", "digits", "--no-latency", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    schemas.check(found)
    assert found["macs"] is None
    assert found["params"] == SIDE * SIDE * 10 + 2  # with its scale and its zero point
    assert "nobody said how images are normalised" in shown.err
    assert run(["eval", str(path), "--no-latency"]) == 0
    assert "MACs" not in capsys.readouterr().out


def test_unknown_macs_stand_beside_known_ones(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    files = [str(folder / "model.pt"), str(handmade(tmp_path / "q.onnx"))]
    common = ["--data", "digits", "--no-latency", "--html", str(page), "--mean", ".3", "--std", ".4"]
    assert run(["compare", *files, *common, "--format", "markdown"]) == 0
    assert "q.onnx" in page.read_text(encoding="utf-8")


WRONG = {
    "two inputs": ("two.onnx", [], "takes 2 inputs (x, y)"),
    "wrong size": ("free.onnx", ["--input-size", "1x16x16"], "takes images of 1x8x8, not of 1x16x16"),
    "whole numbers": ("bytes.onnx", [], "reads tensor(uint8)"),
    "no size": ("open.onnx", [], "how large its input is"),
    "cut off": ("cut.onnx", [], "cut.onnx"),
    "empty": ("empty.onnx", [], "empty.onnx"),
    "bad notes": ("notes.onnx", [], "is damaged"),
    "bad cost": ("cost.onnx", [], "is damaged"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_measured_is_said(case: str, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    name, flags, message = WRONG[case]
    content = (folder / "free.onnx").read_bytes()
    (tmp_path / "free.onnx").write_bytes(content)
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    handmade(tmp_path / "bytes.onnx", kind=TensorProto.UINT8)
    handmade(tmp_path / "open.onnx", ("n", "c", "h", "w"))
    for changed, notes in (("notes.onnx", "{"), ("cost.onnx", '{"macs": -1}')):
        proto = onnx.load_model_from_string(content)
        proto.metadata_props[0].value = notes
        onnx.save(proto, tmp_path / changed)
    two(tmp_path / "two.onnx")
    assert run(["eval", str(tmp_path / name), "--no-latency", *flags]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def two(path: Path) -> None:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", 3)) for name in "xy"]
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, ("n", 3))
    graph = helper.make_graph([helper.make_node("Add", ["x", "y"], ["z"])], "two", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.mark.parametrize("package", ["onnxruntime", "onnx"])
def test_a_missing_package_is_named(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run(["eval", str(folder / "free.onnx"), "--no-latency"]) == 2
    assert "pip install 'prunekit[onnx]'" in capsys.readouterr().err


def test_what_changes_a_network_sends_elsewhere(folder: Path, capsys: Capture) -> None:
    assert run(["slim", str(folder / "free.onnx"), "--ratio", "0.5"]) == 2
    assert "prunekit eval and compare run it" in capsys.readouterr().err


def test_exports_note_their_cost(tmp_path: Path) -> None:
    model = remember(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), Origin("", input=InputSpec((1, 2, 2))))
    pk.export(model, tmp_path / "small.onnx", torch.zeros(1, 1, 2, 2))
    notes = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "small.onnx").metadata_props}
    assert notes["prunekit.json"]["macs"] == 8
