"""Layer times: layers as the trace saw them, tables and their cache, the model of a network, and how noise is told."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunekit as pk
import prunekit.api.latency
import schemas
from prunekit import surgery
from prunekit.api.latency import present_latency
from prunekit.cli.app import run
from prunekit.errors import InputError, SurgeryError
from prunekit.evaluation.timing import apart, cache, runners, table
from prunekit.evaluation.timing.apart import milliseconds_apart
from prunekit.evaluation.timing.conditions import Conditions, milliseconds
from prunekit.evaluation.timing.layers import LayerShape, layers_of
from prunekit.evaluation.timing.model import REST, LatencyModel
from prunekit.evaluation.timing.table import Grid, LayerTimes
from prunekit.exporting.runtimes import OnnxModel
from prunekit.spec import origin_of
from prunekit.workflows.passes import PassImages, PassSchedule, _budgets, run_passes

ONE = Conditions("pytorch", 1, 1, "cpu", "0", "a machine")


class Many(nn.Module):
    """A layer of each kind that is timed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, groups=4, dilation=2)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.up = nn.ConvTranspose2d(24, 8, 2, stride=2)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.depthwise(torch.relu(self.grouped(torch.relu(self.conv(x))))))
        found: torch.Tensor = self.linear(x.mean((2, 3)))
        return found


def layers() -> dict[str, Any]:
    graph = pk.inspect(Many(), torch.zeros(1, 3, 32, 32)).graph
    return {layer.name: layer for layer in layers_of(graph)}


def by_macs(shape: LayerShape, inputs: int, outputs: int) -> float:
    return inputs * outputs * shape.elements(1) / 1e6


def test_layers_are_what_the_trace_saw() -> None:
    found = {name: layer.shape for name, layer in layers().items()}
    ones, none = (1, 1), (0, 0)
    assert found == {
        "conv": LayerShape(3, 16, (16, 16), (3, 3), (2, 2), ones, ones),
        "grouped": LayerShape(16, 24, (12, 12), (3, 3), ones, none, (2, 2), 4),
        "depthwise": LayerShape(24, 24, (10, 10), (3, 3), ones, none, ones, 24),
        "up": LayerShape(24, 8, (20, 20), (2, 2), (2, 2), none, ones, transposed=True),
        "linear": LayerShape(8, 10, (1,)),
    }
    assert found["depthwise"].is_depthwise
    assert not found["grouped"].is_depthwise


def test_widths_are_those_that_are_left() -> None:
    model, x = Many(), torch.zeros(1, 3, 32, 32)
    graph = pk.inspect(model, x).graph
    small, plan = pk.prune("merge", model, x, ratio=0.5, restore="none", scope="all")
    sizes = graph.sizes(surgery.resolve(graph, plan).kept)
    left = {layer.name: layer.widths(sizes) for layer in layers_of(graph)}
    cut = {layer.name: layer.shape for layer in layers_of(pk.inspect(small, x).graph)}
    assert left == {name: (shape.inputs, shape.outputs) for name, shape in cut.items()}
    assert left != {name: (one.shape.inputs, one.shape.outputs) for name, one in layers().items()}


@pytest.mark.parametrize("runtime", ["pytorch", "onnx"])
def test_every_kind_of_layer_runs_at_any_width(runtime: str) -> None:
    conditions = dataclasses.replace(ONE, runtime=runtime, batch=2)
    for layer in layers().values():
        shape = layer.shape
        inputs, outputs = (8, 8) if not shape.is_linear else (4, 6)
        with conditions.held():
            found: Any = runners.layer(shape, inputs, outputs, conditions)()
        assert tuple(found.shape) == (2, outputs, *(() if shape.is_linear else shape.positions))


class Scaled(nn.Module):
    """Two inputs, the second of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = self.conv(x)
        return found if scale is None else found * scale


def test_networks_run_on_inputs_like_the_example() -> None:
    conditions = dataclasses.replace(ONE, batch=3)
    x, scale = torch.zeros(2, 3, 8, 8), torch.ones(2, 1, 1, 1)
    for example in (x, (x, scale), {"x": x, "scale": scale}):
        with conditions.held():
            found: Any = runners.network(Scaled(), example, conditions)()
        assert tuple(found.shape) == (3, 4, 6, 6)
        file = runners.onnx_file(Scaled(), example, dataclasses.replace(conditions, runtime="onnx"))
        again = OnnxModel(file.content)(*map(torch.from_numpy, file.inputs))
        assert tuple(again.shape) == (3, 4, 6, 6)


IN_ONNX = dataclasses.replace(ONE, runtime="onnx")


def test_files_are_timed_in_processes_of_their_own() -> None:
    x = torch.zeros(1, 8, 32, 32)
    small, large = (
        runners.onnx_file(nn.Sequential(nn.Conv2d(8, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3)), x, IN_ONNX)
        for width in (4, 256)
    )
    (first, second), spread = milliseconds_apart([small, large], IN_ONNX)
    assert 0 < 4 * first < second
    assert spread >= 0


def test_what_differs_from_process_to_process_is_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    file = runners.onnx_file(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), IN_ONNX)
    answers = iter([[2e-3, 5e-3], [2.04e-3, 4e-3], [3e-3, 4.04e-3], [2.01e-3, 9e-3]])
    monkeypatch.setattr(apart, "_seconds", lambda _: next(answers))
    times, spread = milliseconds_apart([file, file], IN_ONNX)
    assert times == pytest.approx([2.0, 4.0])
    assert spread == pytest.approx(0.01)  # the fourth process was needed for the first file
    answers = iter([[n * 1e-3] for n in (2, 3, 4, 5)])
    with pytest.raises(InputError, match=r"too noisy .* differ by 50%"):
        milliseconds_apart([file], IN_ONNX)


def test_a_file_that_does_not_run_is_refused() -> None:
    file = runners.onnx_file(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), IN_ONNX)
    for broken in (dataclasses.replace(file, content=b"no file"), dataclasses.replace(file, inputs=())):
        with pytest.raises(SurgeryError, match="does not run in a process of its own: "):
            milliseconds_apart([broken], IN_ONNX)


def test_grids_are_read_between_their_widths() -> None:
    grid = Grid((16, 32), (8, 16), np.array([[1.0, 3.0], [2.0, 2.5]])).rising()
    assert grid.times.tolist() == [[1.0, 2.5], [2.0, 2.5]]  # no wider layer is faster
    assert grid.at(24, 8) == 1.5
    assert grid.at(99, 99) == 2.5
    times = LayerTimes(0.0, 16, {LayerShape(32, 16, (4, 4), (1, 1)): grid})
    shape = next(iter(times.grids))
    assert times.at(shape, 17, 3) == times.at(shape, 32, 16) == 2.5  # up to full blocks
    assert times.at(shape, 15, 16) == times.at(shape, 16, 16)


@pytest.mark.parametrize(
    ("whole", "groups", "found"),
    [(512, 1, (64, 128, 256, 384, 512)), (64, 1, (16, 32, 48, 64)), (10, 1, (10,)), (96, 96, (16, 32, 48, 64, 96))],
)
def test_layers_are_measured_at_a_few_widths(whole: int, groups: int, found: tuple[int, ...]) -> None:
    widths = table.widths(whole, 16, groups)
    assert set(widths) <= {16 * n for n in range(33)} | {whole}
    assert widths[-1] == whole
    assert len(widths) <= 5
    if groups == 1:
        assert widths == found


def test_the_cache_gives_back_what_it_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path))
    asked: list[LayerShape] = []

    def grid(shape: LayerShape, *_: object) -> Grid:
        asked.append(shape)
        return Grid((8, 16), (4, 8), np.arange(4.0).reshape(2, 2))

    monkeypatch.setattr(table, "_grid", grid)
    monkeypatch.setattr(table, "_overhead", lambda _: 0.25)
    monkeypatch.setattr(table, "_block", lambda _: 16)
    shapes = [layer.shape for layer in layers().values()]
    first = cache.layer_times(shapes[:3], ONE)
    assert asked == shapes[:3]
    again = cache.layer_times(shapes, ONE)
    assert asked == shapes  # only the others are measured
    assert (again.overhead, again.block) == (first.overhead, first.block) == (0.25, 16)
    found = cache.read(cache.path_of(ONE), ONE)
    assert found is not None
    assert {shape: grid.times.tolist() for shape, grid in found.grids.items()} == {
        shape: [[0.0, 1.0], [2.0, 3.0]] for shape in shapes
    }
    other = dataclasses.replace(ONE, threads=2)
    assert cache.path_of(other) != cache.path_of(ONE)
    assert cache.read(cache.path_of(ONE), other) is None  # whatever its name


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 1}', "times", "version", "binary"])
def test_a_damaged_cache_is_measured_anew(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "_overhead", lambda _: 0.25)
    monkeypatch.setattr(table, "_block", lambda _: 16)
    monkeypatch.setattr(table, "_grid", lambda *_: Grid((8,), (4,), np.ones((1, 1))))
    shape, path = LayerShape(8, 4, (1,)), cache.path_of(ONE)
    cache.layer_times([shape], ONE)
    stored = json.loads(path.read_text())
    if damage == "times":
        stored["layers"][0]["grid"]["times"] = [[1.0, 2.0]]
    elif damage == "version":
        stored["version"] += 1
    content = (
        b"\xff\xfe"
        if damage == "binary"
        else (json.dumps(stored) if damage in ("times", "version") else damage).encode()
    )
    path.write_bytes(content)
    assert cache.read(path, ONE) is None
    assert cache.layer_times([shape], ONE).at(shape, 8, 4) == 1.0
    assert cache.read(path, ONE) is not None


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "file"))
    cache.write(cache.path_of(ONE), ONE, LayerTimes(0.0, 1, {}))
    assert (tmp_path / "file").read_text() == ""


def test_the_cache_is_where_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNEKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.folder() == Path("/somewhere/prunekit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "prunekit"


def test_a_network_is_its_layers_and_the_rest() -> None:
    graph = pk.inspect(Many(), torch.zeros(1, 3, 32, 32)).graph
    every = graph.kept_classes({})
    alone = sum(by_macs(one.shape, *one.widths(graph.sizes(every))) for one in layers_of(graph))
    model = LatencyModel.of(graph, by_macs, alone + 2.0, 0.5, per_call=False)
    parts = model.parts(graph, every)
    assert parts[REST] == pytest.approx(2.0)
    assert model.milliseconds(graph, every) == pytest.approx(alone + 2.0)
    fewer = model.parts(graph, graph.kept_classes({"up": range(1)}))
    assert 0.5 < fewer[REST] < 2.0  # what calls cost stays
    assert fewer["up"] == pytest.approx(parts["up"] / 8)
    assert fewer["conv"] == parts["conv"]


def test_a_residual_block_that_goes_takes_no_time() -> None:
    graph = pk.inspect(pk.load("prunekit:resnet20")).graph
    every, without = graph.kept_classes({}), graph.kept_classes({"layer1.1.conv1": ()})
    model = LatencyModel.of(graph, by_macs, model_time := 100.0, 0.5, per_call=False)
    parts, fewer = model.parts(graph, every), model.parts(graph, without)
    gone = parts["layer1.1.conv1"] + parts["layer1.1.conv2"]
    assert gone > 0
    assert sum(parts.values()) == pytest.approx(model_time)
    assert sum(fewer.values()) < sum(parts.values()) - gone
    assert fewer["layer1.2.conv1"] == parts["layer1.2.conv1"]
    assert fewer.get("layer1.1.conv1", 0.0) == fewer.get("layer1.1.conv2", 0.0) == 0.0


def test_the_block_is_what_the_kernels_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (1, 4, 8, 16, 32):
        monkeypatch.setattr(runners, "layer", lambda _shape, _inputs, outputs, _conditions: outputs)
        monkeypatch.setattr(
            table, "_in_turns", lambda runs, *_, block=block: [float(table.filled(outputs, block)) for outputs in runs]
        )
        assert table._block(ONE) == block


def test_a_noisy_machine_says_how_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.cycle([1.0] * 4 + [1.3] * 4)  # every other turn is slow
    monkeypatch.setattr(Conditions, "seconds", lambda _self, _run: next(ticks))
    with pytest.raises(pk.InputError, match=r"too noisy to measure a latency: .* differ by 30%"):
        milliseconds([lambda: None], ONE)
    ticks = itertools.cycle([1.3, 1.0, 1.1, 1.2])
    assert milliseconds([lambda: None], ONE) == ([1000.0], 0.0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("prunekit.evaluation.timing.conditions.version", missing)
    with pytest.raises(pk.InputError, match="needs the package onnxruntime") as error:
        Conditions.here("onnx")
    assert "prunekit[onnx]" in str(error.value.hint)
    assert Conditions.here("pytorch", threads=1).clock == "cpu"
    assert Conditions.here("pytorch", threads=2).clock == "wall"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Time without a clock: a network takes a millisecond for each million of MACs, and so do its layers."""
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runners, "network", lambda model, example, _: pk.inspect(model, example).cost.macs / 1e6)
    monkeypatch.setattr(prunekit.api.latency, "milliseconds", lambda runs, _: (list(runs), 0.0))
    monkeypatch.setattr(table, "_overhead", lambda _: 0.0)
    monkeypatch.setattr(table, "_block", lambda _: 1)

    def grid(shape: LayerShape, *_: object) -> Grid:
        inputs, outputs = range(1, shape.inputs + 1), range(1, shape.outputs + 1)
        each = shape.elements(1) * int(np.prod(shape.kernel)) / 1e6
        times = np.outer(inputs, outputs).astype(np.float64) * each
        return Grid(tuple(inputs), tuple(outputs), times)

    monkeypatch.setattr(table, "_grid", grid)


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("method", ["slim", "merge"])
def test_networks_come_down_to_a_latency(method: str) -> None:
    model = pk.load("prunekit:resnet20")
    done = pk.prune(method, model, target_latency="60%", latency_on="pytorch", latency_threads=1, latency_batch=4)
    found = done.plan.notes["latency"]
    assert found["before"] == pytest.approx(done.before.macs / 1e6)
    assert found["goal"] == pytest.approx(0.6 * found["before"])
    assert found["after"] == pytest.approx(done.after.macs / 1e6)
    assert found["after"] == pytest.approx(found["predicted"])
    assert found["met"]
    assert (found["runtime"], found["batch"], found["threads"], found["clock"]) == ("pytorch", 4, 1, "cpu")
    assert pk.slim(model, target_latency="60%", latency_threads=1).plan.notes["latency"]["met"]


@pytest.mark.usefixtures("made_up")
def test_the_command_says_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "small.pt")
    settings = ["--target-latency", "60%", "--latency-threads", "1", "--restore", "none"]
    assert run(["merge", "prunekit:resnet20", *settings, "-o", out, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    schemas.check(document)
    assert document["settings"]["target_latency"] == "60%"
    assert document["plan"]["notes"]["latency"]["threads"] == 1
    (step,) = origin_of(pk.load(out)).history  # type: ignore[union-attr]
    assert step["settings"]["latency_threads"] == 1
    assert step["plan"]["notes"]["latency"]["met"]
    assert run(["merge", "prunekit:resnet20", *settings, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "asked for 24.3 ms" in said
    assert "batch 1, 1 thread, CPU time, " in said
    assert run(["merge", "prunekit:resnet20", "--target-latency", "60", "--dry-run"]) == 2
    assert "did you mean 60ms, or 60% of the present latency?" in capsys.readouterr().err


@pytest.mark.usefixtures("made_up")
def test_a_goal_out_of_reach_says_what_takes_the_time() -> None:
    with pytest.raises(pk.InputError, match=r"leaves .* ms, most of it in .*conv") as error:
        pk.merge(pk.load("prunekit:resnet20"), target_latency="2%", latency_threads=1, restore="none")
    assert "(pytorch, batch 1, threads 1)" in error.value.message


@pytest.mark.usefixtures("made_up")
def test_passes_and_sweeps_come_down_to_a_latency() -> None:
    model = pk.load("prunekit:resnet20")
    present = present_latency(model, pk.Config(target_latency="50%"))
    asked = [config.target_latency for config in _budgets(model, pk.Config(target_latency="25%"), 2, None)]
    assert [float(str(text).removesuffix("ms")) for text in asked] == [
        pytest.approx(present / 2),
        pytest.approx(present / 4),
    ]
    points = list(
        pk.sweep(
            model, [pk.Variant("slim")], ["75%"], lambda net, name: pk.evaluate(net, name=name), axis="target_latency"
        )
    )
    (point,) = points
    assert point.error is None
    assert point.budget == ("target_latency", "75%")
    assert point.result is not None
    assert 0.69 * present <= (point.result.macs or 0) / 1e6 <= 0.75 * present
    assert pk.SweepPoint.from_json(point.to_json()) == point


def test_several_processes_measure_no_latency(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    digits = pk.open_data("digits", "test")
    images, schedule = PassImages(digits, None, digits), PassSchedule(pk.TrainConfig(epochs=1))
    config = pk.Config(target_latency="50%")
    with pytest.raises(pk.InputError, match="come to networks of their own"):
        run_passes("slim", pk.load("prunekit:vgg_digits"), config, images, schedule, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["pytorch", "onnx"])
def test_a_real_clock(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path))
    found = pk.slim(pk.load("prunekit:resnet20"), target_latency="80%", latency_on=runtime, latency_threads=1)  # type: ignore[arg-type]
    assert found.plan.notes["latency"]["after"] < found.plan.notes["latency"]["before"]
    assert list(tmp_path.rglob("*.json"))
