"""Exported programs (`.pt2`) of any maker are pruned like the networks that they were made from, and stay programs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
from networks import lively
from prunekit.checkpoint.write import to_bytes
from prunekit.cli.app import run
from prunekit.errors import InputError, PrunekitError
from prunekit.nn.channels import ChannelPad
from prunekit.programs.program import ExportedProgram
from prunekit.spec import InputSpec, Origin, origin_of, remember

Capture = pytest.CaptureFixture[str]


class Block(nn.Module):
    """A bottleneck with a depthwise convolution and a shortcut; padded where the stream grows."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, out, 1, bias=False), nn.BatchNorm2d(out)
        self.pad = ChannelPad(0, out - width) if out != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.pad(x))


class Residual(nn.Module):
    """A small residual network for `(N, 1, 8, 8)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8), nn.MaxPool2d(2), Block(8, 16))
        self.plain, self.fc = nn.Conv2d(16, 12, 3, padding=1), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        return self.fc(torch.flatten(torch.relu(self.plain(x)).mean((2, 3)), 1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return remember(lively(Residual()), Origin("", input=InputSpec((1, 8, 8))))


def program(model: nn.Module, *, batch: int | None = None, decomposed: bool = False) -> bytes:
    """What torch itself writes."""
    shapes = None if batch else ({0: torch.export.Dim("n", min=1)},)
    x = torch.randn(batch or 3, 1, 8, 8, dtype=next(model.parameters()).dtype)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes)
    stream = io.BytesIO()
    torch.export.save(exported.run_decompositions() if decomposed else exported, stream)
    return stream.getvalue()


def loaded(content: bytes) -> ExportedProgram:
    found = pk.load(io.BytesIO(content))
    assert isinstance(found, ExportedProgram)
    return found


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["merge", "slim"])
@pytest.mark.parametrize("made", [{}, {"batch": 2}, {"decomposed": True}], ids=["free", "fixed", "decomposed"])
def test_pruned_as_the_network_is(method: str, made: dict[str, Any], images: Tensor) -> None:
    model = network()
    wanted = pk.prune(method, model, ratio=0.5)
    found = pk.prune(method, loaded(program(model, **made)), ratio=0.5)
    again = loaded(to_bytes(found.model))
    with torch.no_grad():
        for small in (found.model, again):
            torch.testing.assert_close(small(images), wanted.model(images), rtol=1e-10, atol=1e-10)
    assert pk.inspect(again).cost.macs == wanted.after.macs
    assert (found.after.params, found.after.macs) == (wanted.after.params, wanted.after.macs)
    assert again.batch == made.get("batch")
    assert [step["method"] for step in origin_of(again).history] == [method]  # type: ignore[union-attr]
    assert to_bytes(again)[:4] == b"PK\x03\x04"
    outside = torch.export.load(io.BytesIO(to_bytes(found.model))).module()  # as anybody else reads it
    with torch.no_grad():
        torch.testing.assert_close(outside(images[:2]), wanted.model(images[:2]), rtol=1e-10, atol=1e-10)


def test_the_same_bytes_again() -> None:
    content = program(network())
    assert to_bytes(loaded(content)) == to_bytes(loaded(content))


def test_layers_are_modules_again() -> None:
    found = loaded(program(network()))
    kinds = {name: type(module) for name, module in found.named_modules()}
    own = {name: type(module) for name, module in network().named_modules()}
    layers = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    assert {n: k for n, k in kinds.items() if k in layers} == {n: k for n, k in own.items() if k in layers}
    assert sum(kind is ChannelPad for kind in kinds.values()) == 1


class Odd(nn.Module):
    """Calls one weight in two ways, normalises by the batch, and has weights of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1, track_running_stats=False)
        self.filters, self.late = nn.Parameter(torch.randn(4, 1, 1, 1)), nn.Conv2d(4, 10, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + torch.conv2d(x, self.conv.weight, self.conv.bias, padding=2, dilation=2)
        return self.late(torch.conv2d(self.norm(y), self.filters)).flatten(1)


def test_what_is_no_layer_stays_an_operator(images: Tensor) -> None:
    model = Odd().double().eval()
    found = loaded(program(model))
    assert isinstance(found.late, nn.Conv2d)
    assert type(found.conv) is type(found.norm) is nn.Module
    with torch.no_grad():
        torch.testing.assert_close(found(images), model(images), rtol=1e-12, atol=1e-12)


def sizes(x: Tensor) -> Tensor:
    return x.reshape(-1, 6, 64)[:, :, :1].reshape(-1, 6)


class Written(nn.Module):
    """Its sizes stand in its code, so that nothing can go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(sizes(torch.relu(self.norm(self.conv(x)))))


@pytest.mark.parametrize("method", ["merge", "slim"])
def test_what_cannot_be_pruned_is_said(method: str) -> None:
    found = loaded(program(Written().eval()))
    with pytest.raises(PrunekitError, match=r"'slice' in ExportedProgram|the model's output|sizes") as caught:
        pk.prune(method, found, ratio=0.5)
    assert "the checkpoint with its architecture" in str(caught.value.hint)


def test_several_inputs_are_not_written() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    stream = io.BytesIO()
    torch.export.save(torch.export.export(Sum(), (torch.zeros(2, 3), torch.zeros(2, 3))), stream)
    with pytest.raises(InputError, match="takes 2 inputs"):
        to_bytes(loaded(stream.getvalue()))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt2"
    path.write_bytes(program(network().float()))
    return path


def test_the_commands(file: Path, capsys: Capture) -> None:
    assert run(["merge", str(file), "--ratio", "0.5", "--json"]) == 0, capsys.readouterr().err
    facts = json.loads(capsys.readouterr().out)
    target = file.with_name("net-merge.pt2")
    assert facts["output"] == str(target)
    assert run(["inspect", str(target), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["params"] == facts["after"]["params"]
    assert [step["method"] for step in seen["history"]] == ["merge"]
    options = ["--data", "digits", "--epochs", "1", "--device", "cpu", "--batch-size", "256"]
    assert run(["slim", str(target), "--ratio", "0.2", *options, "-o", str(file.with_name("slim.pt2"))]) == 0
    assert run(["eval", str(file.with_name("slim.pt2")), "--data", "digits", "--no-latency", "--json"]) == 0
    before, after = (dict(loaded(p.read_bytes()).named_buffers()) for p in (target, file.with_name("slim.pt2")))
    assert not torch.equal(before["blocks.2.bn3.running_mean"], after["blocks.2.bn3.running_mean"])  # norms were tuned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "net.pt2", "--ratio", "0.5", "-o", "out.pt"], "an exported program stays one"),
        (["merge", "prunekit:vgg_digits", "--ratio", "0.5", "-o", "out.pt2"], "a .pt2 is an exported program"),
        (["train", "net.pt2", "--data", "digits", "-o", "out.pt"], "an exported program stays one"),
        (["manidp", "train", "net.pt2", "--data", "digits"], "does not keep gates apart"),
    ],
)
def test_bad_flags_leave_nothing(
    arguments: list[str], message: str, file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert run(arguments) == 2
    assert message in capsys.readouterr().err
    assert [entry.name for entry in file.parent.iterdir()] == ["net.pt2"]


def test_a_program_for_one_batch_size_is_exported_for_it(tmp_path: Path) -> None:
    found = loaded(program(network(), batch=2))
    with pytest.raises(InputError, match="batches of 2 alone"):
        pk.export(found, tmp_path / "x.pt2")
    assert pk.export(found, tmp_path / "x.pt2", fixed_batch=2).parity.difference < 1e-10
