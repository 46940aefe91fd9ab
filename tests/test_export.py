"""Files that stand alone: checked when written, and readable without prunekit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import prunekit as pk
from prunekit import models
from prunekit.errors import InputError, SurgeryError


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return pk.slim(models.build("resnet20_cifar"), ratio=0.5)[0]


def test_pt2_runs_in_a_process_without_prunekit(small: nn.Module, tmp_path: Path) -> None:
    assert pk.export(small, tmp_path / "small.pt2") < 1e-5
    x = torch.randn(5, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import torch, sys; x = torch.load('x.pt'); y = torch.export.load('small.pt2').module()(x); "
        "torch.save(y.detach(), 'y.pt'); sys.exit('prunekit' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=False).returncode == 0
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), small(x))
        torch.testing.assert_close(pk.load(tmp_path / "small.pt2")(x), small(x))


def test_onnx_agrees_with_onnxruntime(small: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert pk.export(small, tmp_path / "small.onnx") < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    x = torch.randn(3, 3, 32, 32)  # another batch size than that of the export
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), small(x), rtol=1e-3, atol=1e-4)


def test_bad_input(small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has the suffix '\.txt'"):
        pk.export(small, tmp_path / "small.txt")
    (tmp_path / "there.pt2").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists"):
        pk.export(small, tmp_path / "there.pt2")
    assert (tmp_path / "there.pt2").read_bytes() == b"mine"


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else -self.conv(x)

    with pytest.raises(SurgeryError, match="cannot be exported"):
        pk.export(Branch(), tmp_path / "b.pt2", torch.zeros(1, 3, 4, 4))
    assert not list(tmp_path.iterdir())
