"""Files that stand alone: checked before they are kept, and readable without prunekit."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
import schemas
from networks import lively, random_network
from prunekit import models, surgery
from prunekit.cli.app import run
from prunekit.errors import CheckFailed, InputError, SurgeryError
from prunekit.exporting import writer as exporting
from prunekit.exporting.parity import compare, require, sized
from prunekit.exporting.runtimes import OnnxModel, stranger
from prunekit.spec import origin_of
from prunekit.surgery.editing.batch_norm_folding import fold_batch_norms

ONNX = pytest.mark.skipif(
    not (pytest.importorskip("onnxscript") and pytest.importorskip("onnxruntime")),
    reason="no onnxscript or onnxruntime",
)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A pruned network for the digits."""
    torch.manual_seed(0)
    return pk.merge(lively(models.build("vgg_digits", {"config": "8-M-16"})).float(), ratio=0.5).model


@pytest.fixture(scope="module")
def saved(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exports") / "small.pt"
    pk.save(small, path)
    return path


def test_pt2_runs_in_a_process_without_prunekit(small: nn.Module, tmp_path: Path) -> None:
    done = pk.export(small, tmp_path / "small.pt2")
    assert done.parity.difference < 1e-5
    assert (done.parity.agreement, done.parity.images) == (1.0, 64)
    x = torch.randn(5, 1, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import torch, sys; x = torch.load('x.pt'); y = torch.export.load('small.pt2').module()(x); "
        "torch.save(y.detach(), 'y.pt'); sys.exit('prunekit' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=False).returncode == 0
    again = pk.load(tmp_path / "small.pt2")
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), small(x))
        torch.testing.assert_close(again(x), small(x))
    assert origin_of(again).input == origin_of(small).input  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("blocked", "reason"), [([], "PytorchStreamReader|zip"), (["torch.export"], "import of torch.export halted")]
)
def test_the_last_words_of_the_other_process(blocked: list[str], reason: str) -> None:
    with stranger(b"no program", blocked) as runtime, pytest.raises(SurgeryError, match=reason):
        runtime(torch.zeros(1))


@ONNX
def test_onnx_takes_any_batch_and_says_what_it_is(small: nn.Module, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    done = pk.export(small, tmp_path / "small.onnx", opset=20)
    assert (done.opset, done.parity.agreement) == (20, 1.0)
    assert done.parity.difference < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
    x = torch.randn(3, 1, 8, 8)  # another batch size than that of the export
    with torch.no_grad():
        torch.testing.assert_close(OnnxModel(done.content)(x), small(x), rtol=1e-3, atol=1e-4)
    proto = onnx.load_from_string(done.content)
    said = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert said["prunekit.json"]["input"] == origin_of(small).input.to_json()  # type: ignore[union-attr]
    assert str(Path(pk.__file__).parent).encode() not in done.content


@ONNX
def test_a_fixed_batch_takes_no_other(small: nn.Module, tmp_path: Path) -> None:
    done = pk.export(small, tmp_path / "small.onnx", fixed_batch=3)
    assert OnnxModel(done.content)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    with pytest.raises(Exception, match="Got: 2 Expected: 3"):
        OnnxModel(done.content)(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("seed", range(25))
def test_folded_batch_norms_leave_the_function_alone(seed: int) -> None:
    model, x = random_network(seed), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    folded, gone = fold_batch_norms(model, surgery.trace(model, x))
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)] == before
    assert all(isinstance(folded.get_submodule(name), nn.Identity) for name in gone)


def test_only_what_a_convolution_alone_feeds_is_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.both, self.alone = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.three(x)  # also read without its batch norm
            return self.both(self.one(x)) + self.both(self.two(x)) + self.alone(y) + y

    model, x = lively(Shared()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert fold_batch_norms(model, surgery.trace(model, x))[1] == ()
    resnet = lively(models.build("resnet20_cifar"))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    folded, gone = fold_batch_norms(resnet, surgery.trace(resnet, x))
    assert len(gone) == 19
    with torch.no_grad():
        torch.testing.assert_close(folded(x), resnet(x), rtol=1e-10, atol=1e-10)


def test_a_file_that_computes_something_else_is_not_kept(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = exporting.formats.to_pt2

    def spoiled(model: nn.Module, *others: object) -> bytes:
        with torch.no_grad():
            next(model.parameters())[0] *= 1.01
        return genuine(model, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(exporting.formats, "to_pt2", spoiled)
    with pytest.raises(CheckFailed, match="outputs differ"):
        pk.export(small, tmp_path / "small.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda y: y + 2e-4, "outputs differ"),
        (lambda y: torch.full_like(y, torch.nan), "outputs differ"),
        (lambda y: y[:, :5], "outputs of shape"),
        (lambda y: y + 5e-5 * (1 - nn.functional.one_hot(y.argmax(1), 10)), "names 100.00%"),
    ],
)
def test_what_a_comparison_sees(found: Callable[[Tensor], Tensor], message: str) -> None:
    class Constant(nn.Module):
        def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.change = change

        def forward(self, x: Tensor) -> Tensor:
            return self.change(torch.zeros(len(x), 10).index_fill(1, torch.tensor([3]), 4e-5))

    batches = [(torch.zeros(4, 1), torch.full((4,), 3)), (torch.zeros(2, 1), torch.full((2,), 3))]
    same = compare(Constant(lambda y: y), Constant(lambda y: y), batches)
    assert (same.difference, same.agreement, same.images, same.accuracy) == (0, 1, 6, 1)
    with pytest.raises(CheckFailed, match=message):
        require(compare(Constant(lambda y: y), Constant(found), batches))


def test_images_are_cut_to_the_one_batch_size() -> None:
    batches = [(torch.arange(5.0)[:, None], torch.arange(5)), (torch.arange(5.0, 8)[:, None], torch.arange(5, 8))]
    cut = list(sized(batches, 3))
    assert [labels.tolist() for _, labels in cut if labels is not None] == [[0, 1, 2], [3, 4, 5]]
    assert all(torch.equal(images.flatten(), labels.float()) for images, labels in cut if labels is not None)


def test_bad_input(small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has the suffix '\.txt'"):
        pk.export(small, tmp_path / "small.txt")
    (tmp_path / "there.pt2").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists"):
        pk.export(small, tmp_path / "there.pt2")
    assert (tmp_path / "there.pt2").read_bytes() == b"mine"


class Branch(nn.Module):
    """Takes another path for other values, which no exported graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="cannot be exported"):
        pk.export(Branch(), tmp_path / "b.pt2", torch.zeros(1, 3, 4, 4))
    assert not list(tmp_path.iterdir())


def test_the_command_shows_both_side_by_side(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "small.pt2"
    arguments = ["export", str(saved), "-o", str(target), "--data", "digits", "--fold-bn"]
    assert run([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    schemas.check(facts)
    assert facts["parity"]["images"] == 355
    assert facts["parity"]["agreement"] == 1
    assert facts["parity"]["accuracy"] == facts["parity"]["exported_accuracy"]
    assert len(facts["folded"]) == 2
    assert facts["bytes"] == target.stat().st_size
    assert set(facts["latency_ms"]) == {"model", "exported"}
    assert run(["eval", str(target), "--data", "digits", "--no-latency", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == facts["parity"]["accuracy"]


@ONNX
def test_a_file_can_go_to_standard_output(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    assert run(["export", str(saved), "--format", "onnx", "-o", "-", "--no-latency"]) == 0
    assert OnnxModel(out.getvalue())(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-o", "small.txt"], 2, "has the suffix '.txt'"),
        (["-o", "small.pt2", "--format", "onnx"], 2, "disagree"),
        (["-o", "small.pt2", "--opset", "20"], 2, "--opset is ONNX's"),
        (["-o", "small.onnx", "--opset", "7"], 2, "--opset 7 cannot be reached"),
        (["-o", "small.onnx", "--fixed-batch", "0"], 2, "--fixed-batch must be at least 1"),
        (["-o", "small.pt2", "--tolerance", "0"], 2, "--tolerance must be positive"),
        (["-o", "small.pt2", "--min-agreement", "99"], 2, "is not a share"),
        (["-o", "small.onnx", "--tolerance", "1e-30"], 1, "outputs differ"),
        (["-o", "small.onnx", "--format", "tflite"], 2, "unknown format 'tflite'"),
    ],
)
def test_bad_flags_leave_nothing(
    arguments: list[str],
    status: int,
    message: str,
    saved: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["export", str(saved), *arguments]) == status
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) <= 2
    assert not list(tmp_path.iterdir())
