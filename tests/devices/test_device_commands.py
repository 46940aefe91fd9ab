"""Every command that computes does so on `--device`, and writes and prints what it does on the CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import network_with_gates, same, small_network

import prunekit as pk
from commands import leaves
from prunekit.cli.app import run
from prunekit.spec import InputSpec, Origin, remember

TRAINING = ["--epochs", "1", "--batch-size", "128"]
# by command: what is said beside the model, and what it writes
COMMANDS: dict[str, tuple[list[str], str | None]] = {
    "inspect net.pt": (["--sensitivity", "--data", "digits", "--ratios", "0.5", "--images", "40"], None),
    "slim net.pt": (["--ratio", "0.4", "--data", "digits", "--calibration", "64", "-o", "out.pt"], "out.pt"),
    "merge net.pt": (["--ratio", "0.4", "--restore", "moments", "-o", "out.pt"], "out.pt"),
    "random net.pt": (["--ratio", "0.4", "-o", "out.pt"], "out.pt"),
    "l1-norm net.pt": (["--ratio", "0.4", "--data", "digits", *TRAINING, "-o", "out.pt"], "out.pt"),
    "taylor net.pt": (["--ratio", "0.4", "--data", "digits", "--calibration", "64", "-o", "out.pt"], "out.pt"),
    "narrow-heads vit.pt": (["--ratio", "0.5", "-o", "out.pt"], "out.pt"),
    "fit net.pt": (["--max-drop", "30%", "--data", "digits", "--calibration", "64", "-o", "out.pt"], "out.pt"),
    "sweep net.pt": (["--ratios", "0.4", "--methods", "slim", "--data", "digits", "--no-latency", "-o", "s"], None),
    "train net.pt": (["--data", "digits", *TRAINING, "-o", "out.pt"], "out.pt"),
    "eval net.pt": (["--data", "digits", "--no-latency"], None),
    "eval gated.pt": (["--data", "digits", "--no-latency", "--per-image", "images.csv"], "images.csv"),
    "compare net.pt gated.pt": (["--data", "digits", "--no-latency"], None),
    "manidp train net.pt": (["--data", "digits", *TRAINING, "-o", "out.pt"], "out.pt"),
    "manidp calibrate gated.pt": (
        ["--data", "digits", "--images", "200", "--target-macs", "70%", "--foresee", "1", "-o", "out.pt"],
        "out.pt",
    ),
    "manidp report gated.pt": (["--data", "digits", "-o", "out.html"], "out.html"),
    "manidp ablate net.pt": (["--data", "digits", "--target-macs", "80%", *TRAINING, "-o", "folder"], None),
    "manidp prune-static static.pt": (["--data", "digits", "-o", "out.pt"], "out.pt"),
}
# what reads, converts and exports files, and what shows a story on the CPU
ELSEWHERE = {"export", "convert", "archs", "methods", "completion", "demo"}
_TIMES = re.compile(r'"(seconds|verify_seconds|made|images_per_second|second_device|date)": [^,}]*')
_ROUNDING = re.compile(r"\d\.\d+e-(0[5-9]|1\d)")  # how far a proof's two sides are apart is rounding itself


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    known = Origin("prunekit:vgg_digits", {"config": "8-8-M-8", "width": 1}, input=InputSpec((1, 8, 8)))
    pk.save(small_network(), folder / "net.pt")
    pk.save(pk.load("prunekit:vit_digits", arch_args={"depth": 1}), folder / "vit.pt")
    gated = network_with_gates()
    pk.save(gated, folder / "gated.pt")
    for _, layer in pk.manidp.gated_layers(gated):
        layer.gate.excite.bias.data[:2] = -1e3
    pk.save(gated, folder / "static.pt")
    assert known
    remember(gated, known)
    return folder


def test_every_command_that_computes_is_here() -> None:
    names = {" ".join(command.split()[: 1 + command.startswith("manidp")]) for command in COMMANDS}
    assert names | ELSEWHERE == set(leaves())
    for name, command in leaves().items():
        assert (name not in ELSEWHERE) == any(p.name == "device" for p in command.params), name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_on_the_device_what_it_does_on_the_cpu(
    command: str,
    networks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, written = COMMANDS[command]
    calls = count_calls(monkeypatch)
    results = []
    for place in ("cpu", "second"):
        folder = tmp_path / place
        folder.mkdir()
        for file in networks.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        monkeypatch.chdir(folder)
        calls.clear()
        assert run([*command.split(), *options, "--device", place, "--json", "-q"]) == 0
        assert any(device.type == place for device in calls), f"nothing was computed on {place}"
        said = capsys.readouterr().out
        said = re.sub(_TIMES, "", said.replace("second:0", "cpu").replace('"second"', '"cpu"'))
        said = re.sub(_ROUNDING, lambda found: f"{float(found[0]):.3g}", said)
        results.append((said, _content(folder / written) if written else None))
    (wanted, wanted_file), (found, found_file) = results
    assert found == wanted
    same(found_file, wanted_file, None)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices of all convolutions that are run."""
    seen: list[torch.device] = []
    plain = torch.nn.Conv2d.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.device)
        return plain(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    return seen


def _content(path: Path) -> Any:
    if path.suffix == ".pt":
        return pk.load(path).state_dict()
    text = path.read_text(encoding="utf-8")
    return re.sub(r"second:0", "cpu", text)


def test_by_itself_a_command_takes_the_device_that_is_there(
    networks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(networks)
    assert run(["eval", "net.pt", "--latency-batch", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["latency_ms"]["device"] == "second device"


@pytest.mark.parametrize("command", ["eval net.pt", "manidp calibrate gated.pt", "slim net.pt"])
def test_a_device_that_is_not_there(
    command: str, networks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(networks)
    assert run([*command.split(), *COMMANDS[command][0], "--device", "cuda:9"]) == 2
    said = capsys.readouterr().err
    assert "device 'cuda:9' cannot be used" in said
    assert "there are cpu, second:0, second:1" in said
