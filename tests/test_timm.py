"""timm's networks by name, there and back: weights of a file, pruned, saved, and read again without naming them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import prunekit as pk
from prunekit.cli.app import run

timm = pytest.importorskip("timm", reason="needs timm")


@pytest.mark.parametrize("name", ["resnet10t", pytest.param("convnext_atto", marks=pytest.mark.slow)])
def test_there_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    original = timm.create_model(name, num_classes=5).eval()
    save_file(original.state_dict(), tmp_path / "weights.safetensors")
    source, small = str(tmp_path / "weights.safetensors"), str(tmp_path / "small.pt")
    named = ["--arch", f"timm:{name}", "--arch-args", "num_classes=5", "--input-size", "64"]
    assert run(["merge", source, *named, "--ratio", ".3", "--scope", "all", "--restore", "none", "-o", small]) == 0
    capsys.readouterr()
    assert run(["inspect", small]) == 0  # and it needs no --arch, nor any code to be trusted
    again, x = pk.load(small), torch.rand(2, 3, 64, 64)
    assert again(x).shape == (2, 5)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in original.parameters())
    whole = pk.load(source, arch=f"timm:{name}", arch_args={"num_classes": 5})
    torch.testing.assert_close(whole(x), original(x))


def test_its_input_is_known_and_a_name_is_a_network() -> None:
    model = pk.load("timm:resnet10t")
    assert pk.inspect(model).graph.example_shapes == ((1, 3, 176, 176),)


@pytest.mark.parametrize("argument", ["pretrained", "checkpoint_path", "pretrained_cfg", "cache_dir"])
def test_nothing_is_fetched(argument: str) -> None:
    with pytest.raises(pk.InputError, match="weights are no argument"):
        pk.models.build("timm:resnet10t", {argument: True})


def test_unknown_names_are_told() -> None:
    for name in ("resnet10", "hf-hub:somebody/net", "hf_hub:somebody/net"):
        with pytest.raises(pk.InputError, match="timm"):
            pk.models.build(f"timm:{name}", {})
