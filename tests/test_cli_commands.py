"""The commands, run in this process on small networks: what they write, what they print, how they end."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from commands import Capture, call, document
from prunekit import checkpoint, models
from prunekit.cli.app import run
from prunekit.data import folder
from prunekit.methods import registry
from prunekit.spec import origin_of

METHODS = registry.names()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network for the digits whose channels differ."""
    torch.manual_seed(0)
    model = models.build("vgg_digits", {"config": "8-8-M-16", "width": 1})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.1, 1.0)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    path = tmp_path_factory.mktemp("models") / "net.pt"
    checkpoint.save(model, path)
    return path


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("transformers") / "vit.pt"
    checkpoint.save(models.build("vit_digits", {"depth": 1}), path)
    return path


@pytest.fixture
def suited(method: str, network: Path, transformer: Path) -> Path:
    """A network in which the method finds something to prune."""
    return transformer if registry.get(method).inside_heads else network


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes, *arguments: object) -> bytes:
    """Standard output of a command that reads `content` from standard input."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    assert run([str(argument) for argument in arguments]) == 0
    return out.getvalue()


def pruning(method: str, network: Path) -> list[object]:
    """A method's command on a network, with images where the method reads their labels."""
    return [method, network, *(("--data", "digits") if registry.get(method).labelled else ())]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_prints_the_path_of_what_it_wrote(method: str, suited: Path, capsys: Capture) -> None:
    status, out, err = call(capsys, *pruning(method, suited), "--ratio", "0.25", "-o", "small.pt")
    assert (status, out) == (0, "small.pt\n")
    assert "masked and sliced agree" in err
    before, after = checkpoint.load(suited), checkpoint.load("small.pt")
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in before.parameters())
    origin = origin_of(after)
    assert origin is not None
    assert [step["method"] for step in origin.history] == [method]
    assert call(capsys, *pruning(method, suited), "--ratio", "0.25", "-o", "small.pt", "-q", "--force") == (
        0,
        "small.pt\n",
        "",
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_document_of_a_method(method: str, suited: Path, capsys: Capture) -> None:
    facts = document(capsys, *pruning(method, suited), "--ratio", "0.25", "-o", "small.pt")
    keys = ["schema", "version", "output", "settings", "before", "after", "plan", "protected", "frozen"]
    assert list(facts) == [*keys, "seconds", "verify"]
    assert facts["schema"] == f"prunekit.{method}"
    assert facts["output"] == "small.pt"
    assert set(facts["before"]) == set(facts["after"]) == {"params", "macs", "channels"}
    assert facts["settings"]["ratio"] == 0.25
    kept = {group: sum(last - first + 1 for first, last in runs) for group, runs in facts["plan"]["keep"].items()}
    assert sum(kept.values()) > 0
    measured = document(capsys, "eval", "small.pt", "--no-latency")
    assert {key: measured[key] for key in ("params", "macs")} == {
        key: facts["after"][key] for key in ("params", "macs")
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_writes_nothing_and_predicts_right(method: str, suited: Path, here: Path, capsys: Capture) -> None:
    dry = document(capsys, *pruning(method, suited), "--ratio", "0.5", "-o", "small.pt", "--dry-run")
    assert dry["output"] is None
    status, out, _ = call(capsys, *pruning(method, suited), "--ratio", "0.5", "-o", "small.pt", "--dry-run")
    assert status == 0
    assert ("blocks.0" if registry.get(method).inside_heads else "features.0") in out
    assert not list(here.iterdir())
    wet = document(capsys, *pruning(method, suited), "--ratio", "0.5", "-o", "small.pt")
    assert (dry["plan"], dry["after"]) == (wet["plan"], wet["after"])


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_identical_files(method: str, suited: Path, here: Path, capsys: Capture) -> None:
    for name in ("one.pt", "two.pt"):
        assert call(capsys, *pruning(method, suited), "--ratio", "0.5", "-o", name)[0] == 0
    assert (here / "one.pt").read_bytes() == (here / "two.pt").read_bytes()


def test_pipes_give_what_files_give(
    network: Path, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(capsys, "slim", network, "--ratio", "0.5", "-o", "slim.pt")
    call(capsys, "merge", "slim.pt", "--ratio", "0.2", "-o", "merged.pt")
    by_files = document(capsys, "eval", "merged.pt", "--data", "digits", "--no-latency")
    slim = piped(monkeypatch, network.read_bytes(), "slim", "-", "--ratio", "0.5", "-o", "-")
    assert slim == (here / "slim.pt").read_bytes()
    merged = piped(monkeypatch, slim, "merge", "-", "--ratio", "0.2", "-o", "-")
    assert merged == (here / "merged.pt").read_bytes()
    by_pipes = json.loads(piped(monkeypatch, merged, "eval", "-", "--data", "digits", "--no-latency", "--json"))
    assert by_pipes["accuracy"] == by_files["accuracy"]
    assert by_pipes["bytes"] == by_files["bytes"] == len(merged)
    assert by_pipes["model"] == "stdin"


def test_the_document_of_eval(network: Path, capsys: Capture) -> None:
    one = document(capsys, "eval", network, "--data", "digits", "--threads", "1")
    figures = ["accuracy", "accuracy_top5", "loss", "images", "params", "macs", "bytes", "latency_ms"]
    fields = ["model", *figures, "runtime", "balanced_accuracy", "metric", "scores", "score"]
    assert list(one) == ["schema", "version", "results", *fields]
    assert one["schema"] == "prunekit.eval"
    assert list(one["results"][0]) == fields
    assert one["images"] == 355
    assert one["bytes"] == network.stat().st_size
    assert {"p50", "p95", "batch", "threads", "device"} <= set(one["latency_ms"])
    two = document(capsys, "eval", network, "prunekit:vgg_digits", "--no-latency")
    assert [result["accuracy"] for result in two["results"]] == [None, None]
    assert "params" not in two


def test_eval_shows_models_side_by_side(network: Path, capsys: Capture) -> None:
    status, out, _ = call(capsys, "eval", network, "prunekit:vgg_digits", "--data", "digits", "--no-latency")
    assert status == 0
    assert "accuracy" in out
    assert "prunekit:vgg_digits" in out
    assert "latency" not in out


def test_a_least_accuracy_that_is_not_met(network: Path, capsys: Capture) -> None:
    status, out, err = call(capsys, "eval", network, "--data", "digits", "--no-latency", "--min-accuracy", "0.999")
    assert status == 1
    assert "accuracy" in out
    assert "less accurate than the 99.90 % asked for" in err
    assert call(capsys, "eval", network, "--data", "digits", "--no-latency", "--min-accuracy", "0")[0] == 0


def test_the_document_of_inspect(network: Path, capsys: Capture) -> None:
    call(capsys, "slim", network, "--ratio", "0.5", "-o", "small.pt")
    facts = document(capsys, "inspect", "small.pt")
    assert facts["schema"] == "prunekit.inspect"
    assert facts["arch"] == "vgg_digits"
    assert facts["input"]["shape"] == [1, 8, 8]
    assert [step["method"] for step in facts["history"]] == ["slim"]
    assert facts["params"] == sum(layer["params"] for layer in facts["layers"])
    assert set(facts["groups"][0]) == {"name", "channels", "removable", "producers", "consumers", "frozen"}
    assert facts["frozen"] == {"the model's output": ["fc"]}
    status, out, _ = call(capsys, "inspect", "small.pt")
    assert status == 0
    assert "slim, ratio=0.5" in out


def test_a_training_run(here: Path, capsys: Capture) -> None:
    scratch = ["--arch", "vgg_digits", "--arch-args", "config=8-M-8", "--epochs", "1", "--device", "cpu"]
    dry = document(capsys, "train", *scratch, "--data", "digits", "--dry-run")
    assert dry["output"] is None
    assert not list(here.iterdir())
    facts = document(capsys, "train", *scratch, "--data", "digits", "--sparsity", "1e-3", "-o", "net.pt")
    assert facts["output"] == "net.pt"
    assert len(facts["history"]) == 1
    assert {path.name for path in here.iterdir()} == {"net.pt", "net.metrics.jsonl"}
    origin = origin_of(checkpoint.load("net.pt"))
    assert origin is not None
    assert origin.classes == tuple("0123456789")
    assert origin.history[0]["settings"]["sparsity"] == 1e-3
    status, out, err = call(
        capsys, "train", "net.pt", "--data", "digits", "--epochs", "1", "--distill", "net.pt", "--device", "cpu"
    )
    assert (status, out) == (0, "net-trained.pt\n")
    assert "epoch 1/1" in err


def test_two_training_runs_with_one_seed_give_identical_files(here: Path, capsys: Capture) -> None:
    scratch = ["train", "--arch", "vgg_digits", "--arch-args", "config=8-M-8", "--epochs", "1"]
    for name in ("one.pt", "two.pt"):
        assert call(capsys, *scratch, "--data", "digits", "--device", "cpu", "--seed", "3", "-o", name)[0] == 0
    assert (here / "one.pt").read_bytes() == (here / "two.pt").read_bytes()


def test_the_demo(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("prunekit.evaluation.score")
    monkeypatch.setattr(module, "measure_latency", partial(module.measure_latency, seconds=0.01))
    facts = document(capsys, "demo", "--epochs", "1")
    names = ["usual", "pruned", "merged", "sparse", "slim", "tuned"]
    assert [result["model"] for result in facts["results"]] == names
    assert {path.stem for path in (here / "prunekit-demo").iterdir()} == set(names)
    status, _, err = call(capsys, "demo", "--epochs", "1")
    assert status == 2
    assert "prunekit-demo/usual.pt exists" in err
    status, _, err = call(capsys, "demo", "--epochs", "1", "--force")
    assert status == 0
    assert err.rstrip().endswith("prunekit fit prunekit-demo/usual.pt --data digits --max-drop 3% -o small.pt")


BAD: dict[str, tuple[list[str], str]] = {
    "no command": (["prune"], "unknown command 'prune'"),
    "no file": (["inspect", "nowhere.pt"], "nowhere.pt"),
    "no architecture": (["inspect", "prunekit:resnet57"], "unknown architecture 'resnet57'"),
    "no data": (["eval", "NET", "--data", "digit"], "unknown data set 'digit'"),
    "no root": (["eval", "NET", "--data", "cifar10"], "cifar10"),
    "no split": (["eval", "NET", "--data", "digits", "--split", "tests"], "unknown split 'tests'"),
    "no criterion": (["merge", "NET", "--ratio", ".5", "--criterion", "l1"], "unknown criterion 'l1'"),
    "no budget": (["slim", "NET"], "exactly one of"),
    "two budgets": (["slim", "NET", "--ratio", ".5", "--target-macs", "50%"], "exactly one of"),
    "ratio of one": (["slim", "NET", "--ratio", "1"], "between 0 and 1"),
    "no number": (["slim", "NET", "--ratio", "half"], "--ratio"),
    "no batch norm": (["slim", "prunekit:lenet_300_100", "--ratio", ".5"], "batch norm"),
    "other images": (["eval", "prunekit:resnet20", "--data", "digits", "--input-size", "1x8x8"], "8"),
    "share": (["eval", "NET", "--data", "digits", "--min-accuracy", "93"], "not a share"),
    "accuracy of nothing": (["eval", "NET", "--min-accuracy", ".9"], "needs --data"),
    "no device": (["eval", "NET", "--device", "quantum"], "device 'quantum' cannot be used"),
    "no batch": (["eval", "NET", "--batch-size", "0"], "--batch-size must be at least 1"),
    "twice": (["eval", "-", "-"], "given twice"),
    "no size": (["eval", "NET", "--input-size", "big"], "not a size"),
    "no folder": (["slim", "NET", "--ratio", ".5", "-o", "no/such/small.pt"], "no/such"),
    "exists": (["slim", "NET", "--ratio", ".5", "-o", "NET"], "exists"),
    "two outputs": (["slim", "NET", "--ratio", ".5", "-o", "-", "--json"], "both want standard output"),
    "nothing to train": (["train", "--data", "digits"], "nothing to train"),
    "no training data": (["train", "NET"], "no data given"),
    "training to a pipe": (["train", "NET", "--data", "digits", "-o", "-"], "goes to a file"),
    "nothing to resume": (["train", "NET", "--data", "digits", "--resume"], "no training state"),
    "no epochs": (["train", "NET", "--data", "digits", "--epochs", "0"], "epochs"),
    "no optimiser": (["train", "NET", "--data", "digits", "--optimizer", "sdg"], "unknown optimizer 'sdg'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case: str, network: Path, here: Path, capsys: Capture) -> None:
    arguments, message = BAD[case]
    status, out, err = call(capsys, *(str(network) if part == "NET" else part for part in arguments))
    lines = err.splitlines()
    assert status == 2
    assert out == ""
    assert lines[0].startswith("error: ")
    assert message in err
    assert len(lines) <= 2
    assert not list(here.iterdir())


def test_an_output_that_exists_survives(network: Path, here: Path, capsys: Capture) -> None:
    (here / "small.pt").write_text("precious")
    assert call(capsys, "slim", network, "--ratio", ".5", "-o", "small.pt")[0] == 2
    assert (here / "small.pt").read_text() == "precious"


@pytest.mark.parametrize("arguments", [["slim", "-", "--ratio", ".5"], ["inspect", "-"]])
def test_an_empty_pipe_is_said_so(arguments: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    status, _, err = call(capsys, *arguments, *(["-o", "-"] if "slim" in arguments else []))
    assert status == 2
    assert "standard input is empty" in err


def test_images_that_were_left_out_are_counted(network: Path, here: Path, capsys: Capture) -> None:
    for name in "0123456789":
        (here / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8), int(name)).save(here / "images" / name / "one.png")
    (here / "images" / "3" / "two.png").write_bytes(b"no picture")
    arguments = ["eval", network, "--data", "images", "--no-latency"]
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert "two.png" in err
    status, _, err = call(capsys, *arguments, "--skip-bad")
    assert status == 0
    assert "1 unreadable image left out" in err


def test_a_method_reads_only_the_pictures_that_it_restores_from(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0", "1"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), 10 * i).save(tmp_path / "images" / name / f"{i}.png")
    names, real = set(), folder.open_picture

    def noting(path: str) -> Image.Image:
        names.add(path)
        return real(path)

    monkeypatch.setattr(folder, "open_picture", noting)
    images = str(tmp_path / "images")
    assert run(["merge", str(network), "--ratio", ".3", "--data", images, "--calibration", "6", "--dry-run"]) == 0
    assert len(names) == 6


def test_the_name_of_a_data_set_that_hides_a_folder_is_pointed_out(
    network: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("digits", "cifar10"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(["eval", str(network), "--data", "digits", "--no-latency"]) == 0
    assert "the folder here is ./digits" in capsys.readouterr().err
    assert run(["eval", str(network), "--data", "cifar10", "--no-latency"]) == 2
    assert "the folder here is ./cifar10" in capsys.readouterr().err


def test_statistics_said_once_are_kept(network: Path, capsys: Capture) -> None:
    arguments = ["slim", network, "--ratio", ".25", "--mean", "0.25", "--std", ".5", "-o", "small.pt"]
    assert call(capsys, *arguments)[0] == 0
    facts = document(capsys, "inspect", "small.pt")
    assert (facts["input"]["mean"], facts["input"]["std"]) == ([0.25], [0.5])


def test_a_state_dict_that_several_networks_fit_needs_its_architecture(assets: Path, capsys: Capture) -> None:
    path = assets / "checkpoints" / "ResNet.cifar10.original.56.pth.tar"
    status, _, err = call(capsys, "inspect", path)
    assert status == 2
    assert "--arch resnet56_cifar --arch-args shortcut=conv,relu=input" in err
    path = assets / "checkpoints" / "resnet20-12fca82f.th"
    status, _, err = call(capsys, "inspect", path)
    assert status == 0
    assert "took --arch resnet20_cifar:" in err
    assert document(capsys, "inspect", path, "--arch", "resnet20_cifar")["params"] == 269722
