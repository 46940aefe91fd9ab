"""A network is traced once and a plan resolved once, whatever a command does with them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
from prunekit.cli.app import run
from prunekit.data import open_data
from prunekit.errors import InputError, SurgeryError
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.fit import add_gates, fit
from prunekit.methods.manidp.runtimes.buckets import bucketed
from prunekit.nn.gated import gated_layers
from prunekit.plan import Keep, Plan
from prunekit.training.config import TrainConfig

RESTORATIONS = [
    *(("slim", restore) for restore in ("none", "constants", "synthetic", "calibrate")),
    *(("merge", restore) for restore in ("none", "paper", "moments", "synthetic", "calibrate")),
]


class Counts:
    """How often networks were traced and plans resolved so far, as the log has it."""

    def __init__(self, log: pytest.LogCaptureFixture) -> None:
        self._log = log

    def _of(self, start: str) -> int:
        return sum(record.getMessage().startswith(start) for record in self._log.records)

    @property
    def traces(self) -> int:
        return self._of("tracing ")

    @property
    def resolutions(self) -> int:
        return self._of("resolved ")


@pytest.fixture
def counts(caplog: pytest.LogCaptureFixture) -> Counts:
    caplog.set_level(logging.DEBUG, "prunekit")
    return Counts(caplog)


def network() -> nn.Module:
    model = pk.load("prunekit:vgg_digits")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.1, 1)
    return model


@pytest.mark.parametrize(("method", "restore"), RESTORATIONS)
def test_pruning(method: str, restore: str, counts: Counts) -> None:
    images = torch.randn(16, 1, 8, 8) if restore == "calibrate" else None
    pk.prune(method, network(), ratio=0.3, restore=restore, images=images)
    assert (counts.traces, counts.resolutions) == (1, 1)


def test_statistics_refitted_besides(counts: Counts) -> None:
    pk.prune("merge", network(), ratio=0.3, restore="paper", refit_bn=True, images=torch.randn(16, 1, 8, 8))
    assert (counts.traces, counts.resolutions) == (1, 1)


class Fixed(nn.Module):
    """Has a width written into its forward, which a trace without a probe takes for one that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 9, 4)
        self.last = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(torch.relu(self.norm(self.conv(x))).view(-1, 72)))


def test_a_retry_reads_the_network_again_with_more_care(counts: Counts) -> None:
    """Sizes written into the code are looked for only where the proof, or the plan, has failed without."""
    with pytest.raises((InputError, SurgeryError)):
        pk.prune("slim", Fixed().eval(), torch.randn(2, 1, 5, 5), ratio=0.5)
    assert 1 < counts.traces <= 3
    assert counts.resolutions <= counts.traces


def test_applying_a_plan(counts: Counts) -> None:
    plan = Plan([Keep("features.3", range(8))])
    pk.apply(network(), plan)
    assert (counts.traces, counts.resolutions) == (1, 1)


def command(*arguments: object) -> None:
    assert run([*map(str, arguments), "-q"]) == 0


def test_the_command_that_prunes(tmp_path: Path, counts: Counts) -> None:
    pk.save(network(), tmp_path / "net.pt")
    command("slim", tmp_path / "net.pt", "--ratio", "0.3", "-o", tmp_path / "small.pt")
    assert (counts.traces, counts.resolutions) == (1, 1)


@pytest.fixture
def gated(tmp_path: Path, counts: Counts) -> Path:
    """The file of a network whose saliencies follow the image."""
    model = add_gates(network(), GateRecipe())
    assert counts.traces == 1
    with torch.no_grad():
        for _, layer in gated_layers(model):
            layer.gate.excite.weight.normal_()
    pk.save(model, tmp_path / "gated.pt")
    return tmp_path / "gated.pt"


def test_measuring_a_runtime(gated: Path, counts: Counts) -> None:
    """The network and, to compare its time with, the one without gates."""
    before = counts.traces
    command("eval", gated, "--data", "digits", "--runtime", "gather", "--threads", 1)
    assert counts.traces == before + 2


def test_measuring_the_fastest_runtime(gated: Path, counts: Counts) -> None:
    before = counts.traces
    command("eval", gated, "--runtime", "auto", "--no-latency")
    assert counts.traces == before + 1


def test_calibrating_gates(gated: Path, counts: Counts) -> None:
    before, images = counts.traces, ("--data", "digits", "--images", 100)
    command("manidp", "calibrate", gated, *images, "--target-macs", "60%,70%", "-o", gated.with_name("half.pt"))
    assert counts.traces == before + 1


def test_cutting_buckets(gated: Path, counts: Counts) -> None:
    """The gated network, the one without gates that all are cut from, and each of those, to fold its batch norms."""
    before, images = counts.traces, ("--data", "digits", "--images", 100)
    command("manidp", "calibrate", gated, *images, "--buckets", 3, "-o", gated.with_name("three.pt"))
    assert counts.traces == before + 1 + 1 + 3
    runner = bucketed(pk.load(gated.with_name("three.pt")))
    assert runner.macs == tuple(pk.inspect(one).cost.macs for one in runner.networks)


def test_training_gates(counts: Counts) -> None:
    """The network, to see where gates go, and the one with gates."""
    model = add_gates(network(), recipe := GateRecipe(start="informed"))
    images = open_data("digits", "train").sample(200)
    fit(model, recipe, TrainConfig(epochs=1, batch_size=100, device="cpu"), images)
    assert counts.traces == 2
