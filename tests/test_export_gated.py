"""Networks with gates as files: one masked graph, or static sub-networks and a router."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
import schemas
from networks import gated
from prunekit import models
from prunekit.cli.app import run
from prunekit.data import ImageSet
from prunekit.errors import CheckFailed, InputError
from prunekit.exporting import writer as exporting
from prunekit.exporting.parity import compare, hangs_on_rounding, require
from prunekit.exporting.runtimes import OnnxModel
from prunekit.methods.manidp.budgets import use_budget
from prunekit.methods.manidp.runtimes import files
from prunekit.methods.manidp.runtimes.buckets import Bucketed, add_buckets, bucketed
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import gated_layers
from prunekit.spec import InputSpec

Capture = pytest.CaptureFixture[str]


def small() -> nn.Module:
    """A gated network of three convolutions for 8 x 8 pixels."""
    torch.manual_seed(0)
    model = gated(models.build("vgg_digits", {"config": "8-16-M-16"}), 8, channels=1)
    with torch.no_grad():
        list(model.parameters())[-2].mul_(10)  # logits that follow the images
    return model


def digits() -> ImageSet:
    return pk.open_data("digits", "test", input_spec=InputSpec((1, 8, 8), (0.3,), (0.4,)))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A gated network with a budget and two sub-networks."""
    model = small().eval()
    images = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    images[30:] += 2  # two kinds, which a router can tell apart
    add_buckets(GatedView.of(model), images, 2)
    with torch.no_grad():  # half of the digits go to each, too
        scores = model.buckets.router(torch.cat([x for x, _ in digits().batches(64)]))
        model.buckets.router.fc.bias[1] += (scores[:, 0] - scores[:, 1]).mean()
    for _, layer in gated_layers(model):
        layer.budgets["open"] = 0.0
    return model


@pytest.fixture(scope="module")
def saved(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gated") / "gated.pt"
    pk.save(network, path)
    return path


@pytest.fixture(scope="module")
def folder_of(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What `export --buckets` writes of the network, by format, made once."""

    @functools.cache
    def make(format: str) -> Path:
        done = files.export_buckets(network, format)  # type: ignore[arg-type]
        assert done.parity.agreement == 1
        files.write_buckets(done, path := tmp_path_factory.mktemp("buckets") / format)
        return path

    return make


def opened(model: nn.Module) -> nn.Module:
    """A copy whose gates let everything through."""
    again = copy.deepcopy(model)
    use_budget(again, "open")
    return again


@pytest.fixture
def images() -> Tensor:
    return torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("format", "fold_bn"), [("onnx", False), ("pt2", True)])
def test_the_masked_graph_is_exact(
    network: nn.Module, images: Tensor, tmp_path: Path, format: str, fold_bn: bool
) -> None:
    target = tmp_path / f"gated.{format}"
    done = pk.export(network, target, fold_bn=fold_bn)
    assert (done.parity.agreement, done.parity.undecided) == (1, 0)
    assert done.parity.difference < 1e-4 * max(1, done.parity.scale)
    assert b"buckets" not in done.content  # the table of sub-networks is no part of it
    runtime = OnnxModel(done.content) if format == "onnx" else pk.load(target)
    with torch.no_grad():
        wanted = network(images)
        torch.testing.assert_close(runtime(images), wanted, rtol=1e-3, atol=1e-3)
        # the gates matter: without thresholds it computes something else
        assert not torch.allclose(opened(network)(images), wanted, atol=0.1)


@pytest.mark.parametrize("format", exporting.FORMATS)
def test_sub_networks_and_their_router(
    network: nn.Module, images: Tensor, folder_of: Callable[[str], Path], format: str
) -> None:
    folder = folder_of(format)
    index = json.loads((folder / files.INDEX).read_text())
    assert index["input"]["shape"] == [1, 8, 8]
    router, *parts = (
        OnnxModel((folder / name).read_bytes()) if format == "onnx" else pk.load(folder / name)
        for name in (index["router"], *(entry["file"] for entry in index["buckets"]))
    )
    runner = bucketed(network)
    with torch.no_grad():
        torch.testing.assert_close(Bucketed(router, parts)(images), runner(images), rtol=1e-3, atol=1e-3)
        # ONNX Runtime one image at a time, as a program elsewhere would do it
        alone = torch.cat([parts[int(router(one).argmax(1))](one) for one in images.split(1)])
        torch.testing.assert_close(alone, runner(images), rtol=1e-3, atol=1e-3)
    assert [entry["macs"] for entry in index["buckets"]] == [pk.inspect(part).cost.macs for part in runner.networks]


def test_a_wrong_part_is_not_kept(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = exporting.formats.to_onnx

    def spoiled(model: nn.Module, *others: object) -> tuple[bytes, int]:
        if isinstance(last := list(model.modules())[-1], nn.Linear) and last.out_features == 10:
            with torch.no_grad():
                last.weight[0] *= 1.1
        return genuine(model, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(exporting.formats, "to_onnx", spoiled)
    with pytest.raises(CheckFailed, match="the exported bucket-0's outputs differ"):
        files.export_buckets(network, "onnx")


def test_only_what_hangs_on_rounding_is_left_out(network: nn.Module, images: Tensor) -> None:
    _, layer = next(gated_layers(network))
    before, seen = layer.threshold.clone(), []
    hook = layer.gate.register_forward_hook(lambda _, __, pi: seen.append(pi))
    with torch.no_grad():
        network(images)
        hook.remove()
        tied = float(seen[0][4].sort().values[-3])  # a saliency of the fifth image lies on the threshold
        layer.threshold.fill_(tied)
        assert hangs_on_rounding(network, images, 1e-6).nonzero().flatten().tolist() == [4]
        wanted = network(images)

        class Other(nn.Module):
            def __init__(self, *changed: int) -> None:
                super().__init__()
                self.changed = list(changed)

            def forward(self, _: Tensor) -> Tensor:
                return wanted.clone().index_fill_(0, torch.tensor(self.changed), 7.0)

        excused = compare(network, Other(4), [(images, None)], tolerance=1e-6)
        assert (excused.undecided, excused.difference, excused.agreement) == (1, 0, 1)
        require(excused)
        with pytest.raises(CheckFailed, match="outputs differ"):
            require(compare(network, Other(4, 5), [(images, None)], tolerance=1e-6))
        same = images[4:5].expand_as(images)
        wanted = network(same)
        with pytest.raises(CheckFailed, match="decides otherwise on 3 of 9"):
            require(compare(network, Other(1, 2, 3), [(same, None)], tolerance=1e-6))
        layer.threshold.copy_(before)


def test_the_command(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "out"
    arguments = ["export", str(saved), "--buckets", "-o", str(target), "--fixed-batch", "1"]
    assert run([*arguments, "--json"]) == 0, capsys.readouterr().err
    facts = json.loads(capsys.readouterr().out)
    schemas.check(facts)
    assert sorted(facts["files"]) == sorted(entry.name for entry in target.iterdir())
    assert facts["files"] == ["router.onnx", "bucket-0.onnx", "bucket-1.onnx", "buckets.json"]
    assert facts["bytes"] == sum(entry.stat().st_size for entry in target.iterdir())
    assert run([*arguments, "--json"]) == 2
    assert "exists already" in capsys.readouterr().err
    (target / "mine.txt").write_text("kept")
    assert run([*arguments, "--force"]) == 2
    assert "holds mine.txt, which is not replaced" in capsys.readouterr().err
    (target / "mine.txt").unlink()
    (target / "bucket-7.pt2").write_bytes(b"of an earlier export")
    assert run([*arguments, "--force", "--no-latency", "-q"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert len(list(target.iterdir())) == 4
    assert run(["eval", str(target), "--threads", "1"]) == 0  # without images: its size and its speed
    shown = capsys.readouterr()
    assert "MACs" not in shown.out
    assert "MACs depend on the sub-network that an image goes to" in shown.err
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("format", exporting.FORMATS)
def test_a_folder_is_measured_as_the_network(
    network: nn.Module, folder_of: Callable[[str], Path], capsys: Capture, format: str
) -> None:
    folder = folder_of(format)
    common = ["--data", "digits", "--no-latency", "--mean", "0.3", "--std", "0.4", "--json"]
    assert run(["eval", str(folder), *common]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    schemas.check(result)
    images, runner = digits(), bucketed(network)
    with torch.no_grad():
        answers = torch.cat([runner(x).argmax(1) for x, _ in images.batches(64)])
        routes = torch.cat([runner.router(x).argmax(1) for x, _ in images.batches(64)]).tolist()
    assert len(set(routes)) == 2
    assert result["accuracy"] == float((answers == images.labels).double().mean())
    router = pk.inspect(runner.router, torch.zeros(1, 1, 8, 8)).cost.macs
    assert result["macs"] == round(router + sum(runner.macs[route] for route in routes) / len(routes))
    weights = sum(p.numel() for p in runner.parameters())
    assert 0.99 * weights < result["params"] <= weights  # ONNX stores equal tensors once
    assert result["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert result["runtime"] == {"onnx": "onnxruntime", "pt2": "pt2"}[format]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another schema": ({"schema": "prunekit.plan"}, "its schema is not prunekit.buckets"),
    "newer": ({"version": 2}, "written by a newer prunekit"),
    "a strange format": ({"format": "pickle"}, "its format is 'pickle'"),
    "a file elsewhere": ({"router": "../router.onnx"}, "'../router.onnx' is none of an export's files"),
    "a number for a file": ({"router": 3}, "3 is none of an export's files"),
    "no networks": ({"buckets": []}, "its networks are not told"),
    "a negative cost": ({"buckets": [{"file": "bucket-0.onnx", "macs": -1}]}, "its networks are not told"),
    "a missing file": ({"router": "bucket-7.onnx"}, "bucket-7.onnx"),
    "no input": ({"input": None}, "does not say how the files go together"),
    "another image size": (
        {"input": {"shape": [1, 16, 16], "mean": [], "std": []}},
        "takes images of 1x8x8, not of 1x16x16",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_folders_that_cannot_be_measured(
    case: str, folder_of: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    changes, message = BROKEN[case]
    place = Path(shutil.copytree(folder_of("onnx"), tmp_path / "out"))
    index = json.loads((place / files.INDEX).read_text())
    (place / files.INDEX).write_text(json.dumps({**index, **changes}))
    assert run(["eval", str(place), "--data", "digits", "--no-latency"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"schema": "prunekit.buckets"}'])
def test_an_index_that_is_none(content: str, folder_of: Callable[[str], Path], tmp_path: Path, capsys: Capture) -> None:
    place = Path(shutil.copytree(folder_of("onnx"), tmp_path / "out"))
    (place / files.INDEX).write_text(content)
    assert run(["eval", str(place)]) == 2
    assert "does not say how the files go together" in capsys.readouterr().err


def test_a_budget_and_its_parity(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "open.pt2"
    assert run(["export", str(saved), "-o", str(target), "--budget", "open", "--no-latency"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(target)
    assert "max |Δlogit|" in shown.err
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(pk.load(target)(x), pk.load(saved, budget="open")(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--buckets", "--fixed-batch", "2"], "not always 2"),
        (["--buckets", "--budget", "open"], "disagree"),
        (["--buckets", "--fold-bn"], "no batch norms"),
        (["--buckets", "-o", "-"], "several files"),
        (["--buckets", "-o", "nowhere/out"], "there is no folder nowhere"),
        (["--budget", "closed", "-o", "x.onnx"], "closed"),
    ],
)
def test_bad_flags_leave_nothing(
    arguments: list[str],
    message: str,
    saved: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["export", str(saved), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--buckets"], ["--budget", "half"]])
def test_flags_of_gates_need_gates(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert run(["export", "prunekit:lenet_300_100", "-o", str(tmp_path / "x.onnx"), *flags]) == 2
    assert f"{flags[0]} is for networks with gates" in capsys.readouterr().err


def test_without_a_table_there_are_no_sub_networks() -> None:
    with pytest.raises(InputError, match="no static sub-networks"):
        files.export_buckets(small(), "onnx")
