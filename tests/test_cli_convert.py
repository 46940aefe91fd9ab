"""From any file to any other: what is read, left out, assumed and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import prunekit as pk
import schemas
from prunekit import models
from prunekit.cli.app import run
from prunekit.errors import InputError
from prunekit.spec import origin_of

Capture = pytest.CaptureFixture[str]
ARGS = {"config": "8-8-M-16"}
FLAGS = ("--arch", "vgg_digits", "--arch-args", "config=8-8-M-16")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(models.build("vgg_digits", ARGS).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pth", ".bin"])
def test_there_and_back(suffix: str, weights: Path, capsys: Capture) -> None:
    there, back = weights.with_name(f"there{suffix}"), weights.with_name("back.pt")
    assert run(["convert", str(weights), *FLAGS, "-o", str(there), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    schemas.check(found)
    assert found["kind"] == ("prunekit" if suffix == ".pt" else "state dict")
    named = () if suffix == ".pt" else FLAGS
    assert run(["convert", str(there), *named, "-o", str(back)]) == 0
    assert same(pk.load(weights, arch="vgg_digits", arch_args=ARGS), pk.load(back))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_programs_are_exported_instead(suffix: str, weights: Path, capsys: Capture) -> None:
    assert run(["convert", str(weights), *FLAGS, "-o", str(weights.with_suffix(suffix))]) == 2
    assert "prunekit export" in capsys.readouterr().err
    assert list(weights.parent.iterdir()) == [weights]


def test_an_existing_file_stays(weights: Path) -> None:
    before = weights.read_bytes()
    assert run(["convert", str(weights), *FLAGS, "-o", str(weights)]) == 2
    assert weights.read_bytes() == before


def test_keys_can_be_left_out(weights: Path, capsys: Capture) -> None:
    state = torch.load(weights)
    torch.save({**state, "loss.weight": torch.ones(3), "loss.bias": torch.ones(3)}, weights)
    target = weights.with_name("m.pt")
    assert run(["convert", str(weights), *FLAGS, "-o", str(target)]) == 2
    assert run(["convert", str(weights), *FLAGS, "--ignore-keys", "loss.*", "-o", str(target)]) == 0
    capsys.readouterr()
    assert run(["inspect", str(weights), *FLAGS, "--ignore-keys", "los.*"]) == 2
    assert "no key like 'los.*'" in capsys.readouterr().err


def test_a_normalisation_that_nobody_stated_is_said_once_and_stored(weights: Path, capsys: Capture) -> None:
    target = weights.with_name("m.pt")
    assert run(["convert", str(weights), *FLAGS, "-o", str(target)]) == 0
    assert "assumed" not in capsys.readouterr().err  # nothing depends on it yet
    spec = origin_of(pk.load(target)).input  # type: ignore[union-attr]
    assert spec is not None
    assert spec.assumed
    assert run(["eval", str(target), "--data", "digits", "--no-latency"]) == 0
    assert capsys.readouterr().err.count("assumed: --mean 0.3051 --std 0.376") == 1
    stated = weights.with_name("stated.pt")
    assert run(["convert", str(target), "--mean", "0.3", "--std", "0.4", "-o", str(stated)]) == 0
    assert run(["eval", str(stated), "--data", "digits", "--no-latency"]) == 0
    assert "assumed" not in capsys.readouterr().err


def test_what_prunekit_trained_assumes_nothing(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef Flat(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    code = f"{tmp_path}/net.py:Flat"
    target = tmp_path / "m.pt"
    assert run(["train", "--arch", code, "--data", "digits", "--epochs", "1", "-o", str(target)]) == 0
    assert run(["eval", str(target), "--arch", code, "--data", "digits", "--no-latency"]) == 0
    assert "assumed" not in capsys.readouterr().err


def test_hyper_parameters_are_arguments_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def Net(width=4, depth=1): return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))\n"
    )
    code, wide = f"{tmp_path}/net.py:Net", nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6))
    hyper = {"width": 6, "lr": 0.1, "milestones": [1, 2]}
    torch.save({"state_dict": wide.state_dict(), "hyper_parameters": hyper}, tmp_path / "c.ckpt")
    model = pk.load(tmp_path / "c.ckpt", arch=code)
    assert same(model, wide)
    assert origin_of(model).arch_args == {"width": 6}  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"net\.py:Net"):
        pk.load(tmp_path / "c.ckpt", arch=code, arch_args={"width": 5})
    assert same(pk.load(tmp_path / "c.ckpt", arch=code, arch_args={"depth": 2}), wide)


@pytest.mark.parametrize("command", ["slim", "merge"])
@pytest.mark.parametrize(("suffix", "instead"), [(".onnx", "export"), (".safetensors", "convert"), (".ONNX", "export")])
def test_no_artefact_under_the_name_of_another_format(
    command: str, suffix: str, instead: str, weights: Path, capsys: Capture
) -> None:
    target = weights.with_suffix(suffix)
    assert run([command, str(weights), *FLAGS, "--ratio", "0.5", "-o", str(target)]) == 2
    assert f"prunekit {instead} MODEL.pt" in capsys.readouterr().err
    assert not target.exists()


def test_what_exists_is_left_replaced_or_skipped(weights: Path, capsys: Capture) -> None:
    target = weights.with_name("small.pt")
    slim = ["slim", str(weights), *FLAGS, "-o", str(target), "--ratio"]
    assert run([*slim, "0.5", "--if-exists", "skip"]) == 0
    first = target.read_bytes()
    for policy, status in (("fail", 2), ("skip", 0)):
        capsys.readouterr()
        assert run([*slim, "0.3", "--if-exists", policy]) == status
        assert target.read_bytes() == first
    assert capsys.readouterr().out == f"{target}\n"
    assert run([*slim, "0.3", "--if-exists", "replace"]) == 0
    assert target.read_bytes() != first
    assert run([*slim, "0.3", "--if-exists", "skip", "--json"]) == 2
    assert run([*slim, "0.3", "--if-exists", "skip", "--force"]) == 2
    assert run([*slim, "0.3", "--if-exists", "overwrite"]) == 2
