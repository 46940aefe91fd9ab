"""`export --int8`: what is kept, what stays in float, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
import schemas
from prunekit.cli.app import run
from prunekit.errors import CheckFailed, InputError
from prunekit.exporting import int8
from prunekit.exporting.int8 import Quantised, quantised, scores
from prunekit.exporting.runtimes import OnnxModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime.quantization")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = pk.load("prunekit:vgg_digits", arch_args={"config": "16-M-32"})
    config = pk.TrainConfig(epochs=6, batch_size=32, device="cpu")
    path = tmp_path_factory.mktemp("int8") / "net.pt"
    pk.save(pk.train(model, config, pk.open_data("digits", "train")).model, path)
    return path


@pytest.fixture(scope="module")
def content(network: Path) -> bytes:
    return pk.export(pk.load(network), network.with_suffix(".onnx")).content


def validation() -> Iterator[tuple[Tensor, Tensor]]:
    return pk.open_data("digits", "val").batches(100)


def images(count: int = 64) -> Tensor:
    return pk.open_data("digits", "train").sample(count).inputs()


def kinds(found: Quantised, name: str) -> list[str]:
    """What makes the inputs of a layer."""
    graph = onnx.load_from_string(found.content).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    layer = next(node for node in graph.node if node.name == name)
    return [makers.get(one, "stored") for one in layer.input]


@pytest.mark.parametrize("method", int8.METHODS)
def test_weights_are_8_bits_and_figures_are_those_of_the_file(content: bytes, method: str) -> None:
    found = quantised(content, images(), validation, max_drop=0.1, method=method)
    assert (found.layers, found.left) == (3, ())
    float_file, file = OnnxModel(content), OnnxModel(found.content)
    right = same = total = float_right = 0
    for batch, labels in validation():
        answers, exact = scores(file(batch)).argmax(1), scores(float_file(batch)).argmax(1)
        right, float_right = right + int((answers == labels).sum()), float_right + int((exact == labels).sum())
        same, total = same + int((answers == exact).sum()), total + len(labels)
    assert (found.accuracy, found.int8_accuracy) == pytest.approx((float_right / total, right / total))
    assert found.agreement == pytest.approx(same / total)
    assert found.agreement > 0.97
    stored = {one.name: one for one in onnx.load_from_string(found.content).graph.initializer}
    weights = [one for one in stored.values() if len(one.dims) == 4]
    assert {one.data_type for one in weights} == {onnx.TensorProto.INT8}
    assert any(list(one.dims) == [16] and one.data_type == onnx.TensorProto.FLOAT for one in stored.values()), (
        "a scale for each channel"
    )


class Spiky(nn.Module):
    """One layer whose activations 8 bits cannot hold: a channel is ten thousand times larger, and cancelled again."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.spread, self.gather = body, nn.Linear(10, 12), nn.Linear(12, 10)
        with torch.no_grad():
            self.spread.weight.zero_()
            self.spread.bias.zero_()
            self.spread.weight[:10] = torch.eye(10)
            self.spread.weight[10:, 0] = 1e5
            self.gather.weight.zero_()
            self.gather.bias.zero_()
            self.gather.weight[:, :10] = torch.eye(10)
            self.gather.weight[0, 10:] = torch.tensor([1.0, -1.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.gather(self.spread(self.body(x)))


def test_layers_that_cannot_be_rounded_stay_in_float(network: Path, tmp_path: Path) -> None:
    model = Spiky(pk.load(network)).eval()
    pk.export(model, tmp_path / "spiky.onnx", torch.zeros(1, 1, 8, 8), tolerance=1e-2)
    spiky = (tmp_path / "spiky.onnx").read_bytes()
    all_int8 = quantised(spiky, images(), validation, max_drop=0.99)
    assert all_int8.drop > 0.2, "the layer is a hard one"
    found = quantised(spiky, images(), validation, max_drop=0.02)
    assert found.drop <= 0.02
    assert 0 < len(found.left) < found.layers
    for name in found.left:
        assert "DequantizeLinear" not in kinds(found, name)
    assert len(found.content) < len(spiky)


def test_nothing_is_kept_where_too_much_is_lost(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_with_float", lambda _, plain, __: _broken(plain))
    with pytest.raises(CheckFailed, match="even with all layers but one in float"):
        quantised(content, images(), validation, max_drop=0.001)


def _broken(plain: object) -> bytes:
    """The file with nothing but zeros for weights."""
    made = onnx.ModelProto()
    made.CopyFrom(plain)
    for one in made.graph.initializer:
        if one.data_type == onnx.TensorProto.FLOAT:
            one.raw_data = bytes(len(one.raw_data))
    return bytes(made.SerializeToString())


def test_too_few_images(content: bytes) -> None:
    with pytest.raises(InputError, match="31 calibration images are too few"):
        quantised(content, images(31), validation, max_drop=0.1)


def test_the_command(network: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "int8.onnx"
    command = ["export", str(network), "-o", str(target), "--int8", "--data", "digits", "--max-drop", "3%"]
    assert run([*command, "--threads", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    schemas.check(document)
    found = document["int8"]
    assert found["bytes"] == target.stat().st_size < document["bytes"]
    assert found["validation"]["accuracy"] - found["validation"]["int8_accuracy"] <= 0.03
    assert set(document["latency_ms"]) == {"model", "exported", "int8"}
    assert run(["eval", str(target), "--data", "digits", "--no-latency", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["results"][0]
    assert measured["accuracy"] == pytest.approx(found["accuracy"], abs=0.006)  # of 355 images, two that are near a tie
    assert run([*command, "--force", "--no-latency"]) == 0
    said = capsys.readouterr()
    assert "int8" in said.err
    assert said.out.strip() == str(target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "a.onnx", "--int8"], "--int8 needs images"),
        (["-o", "a.pt2", "--int8", "--data", "digits"], "not for a .pt2"),
        (["-o", "a.onnx", "--int8", "--data", "digits", "--fixed-batch", "1"], "not for --fixed-batch"),
        (["-o", "a.onnx", "--int8", "--data", "digits", "--calibration", "8"], "8 calibration images are too few"),
        (["-o", "a.onnx", "--int8", "--data", "digits", "--max-drop", "5"], "did you mean --max-drop 5%"),
        (["-o", "a.onnx", "--int8", "--data", "digits", "--calibrate", "best"], "best"),
    ],
)
def test_what_does_not_go_with_int8(
    options: list[str],
    message: str,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["export", str(network), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_runtime_without_int8_kernels_is_told(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(int8, "_INT8", ())
    command = ["export", str(network), "-o", str(tmp_path / "a.onnx"), "--int8", "--data", "digits", "--no-latency"]
    assert run([*command, "--max-drop", "5%"]) == 0
    assert "no int8 kernels" in capsys.readouterr().err
