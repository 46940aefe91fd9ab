"""Every public function on a second device gives, bit for bit, what it gives on the CPU, and leaves it there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compared import CPU, branches, digits, network_with_gates, same, small_network
from torch import Tensor, nn

import prunekit as pk
from prunekit.methods.manidp.runtimes.files import export_buckets
from prunekit.methods.manidp.thresholds import calibrate_kept
from prunekit.plan import Fold, Refit

Work = Callable[[torch.device], Any]
PLAN = pk.Plan([pk.Keep("features.0", [0, 1, 3, 4, 6]), pk.Keep("features.3", range(6))])


@cache
def _made(make: Callable[[], nn.Module]) -> nn.Module:
    return make()


def on(device: torch.device, make: Callable[[], nn.Module] = small_network) -> nn.Module:
    """A fresh copy of such a network on a device."""
    return copy.deepcopy(_made(make)).to(device)


def images(device: torch.device = CPU, count: int = 96) -> Tensor:
    return digits("train", count).inputs().to(device)


def pruned(device: torch.device, name: str, make: Callable[[], nn.Module] = small_network, **settings: Any) -> Any:
    settings = {"ratio": 0.4, **settings}
    done = pk.prune(name, on(device, make), **settings)
    return done.model, done.plan.to_json(), done.difference, done.before, done.after


def restored(device: torch.device, way: str, **more: Any) -> Any:
    model = on(device)
    plan = pk.restore(model, PLAN, way=way, **more)
    return pk.apply(model, plan), plan.notes


def applied(device: torch.device, plan: pk.Plan, make: Callable[[], nn.Module] = small_network) -> Any:
    model = on(device, make)
    small = pk.apply(model, plan)
    return small, pk.verify(model, small, plan)


def by_scores(device: torch.device) -> Any:
    graph = pk.inspect(on(device)).graph
    draw = np.random.default_rng(0)
    scores = {group.name: draw.random(group.size) for group in graph.groups if group.free}
    return pk.plan_by_scores(graph, scores, pk.Config(target_macs="60%")).to_json()


def fitted(device: torch.device) -> Any:
    held_out, goal = digits("test", 200), pk.DropGoal(0.9, confidence=0.6)
    ways = [pk.Variant("slim", {}), pk.Variant("merge", {"restore": "paper"})]
    done = pk.fit(on(device), held_out, goal, images=images(), ways=ways)
    return done.model, [(trial.cost, trial.met) for trial in done.history]


def swept(device: torch.device, **more: Any) -> Any:
    def measure(model: nn.Module, name: str) -> pk.EvalResult:
        assert all(p.device.type == device.type for p in model.parameters())
        return pk.evaluate(model, digits(), name=name)

    points = pk.sweep(on(device), [pk.Variant("slim", {}), pk.Variant("taylor", {})], [0.3], measure, **more)
    assert not [point.error for point in points if point.error]
    return [(point.result.accuracy, point.result.macs) for point in points if point.result]


def saved(device: torch.device) -> Any:
    model = on(device)
    pk.save(model, "net.pt", force=True)
    again = pk.load("net.pt", map_location=device)
    assert next(pk.load("net.pt").parameters()).device == CPU
    return again, Path("net.pt").read_bytes()


def exported(device: torch.device, kind: str, **more: Any) -> Any:
    done = pk.export(on(device), f"net.{kind}", force=True, **more)
    return done.parity.difference, done.folded, Path(f"net.{kind}").stat().st_size


def data(device: torch.device) -> Any:
    moved = digits().to(device)
    backwards = moved.relabelled([*moved.classes][::-1])
    batches = list(moved.batches(20, device=device, dtype=torch.float64, channels_last=True))
    part = moved.subset(torch.arange(5))
    assert moved.inputs().device == CPU
    return backwards.labels, batches, part.images, part.labels, moved.sample(7).labels


def gated_network(device: torch.device) -> Any:
    gated = pk.manidp.add_gates(on(device), pk.manidp.GateRecipe(keep=0.6))
    return gated, gated(images(device, 8)).detach()


def view_of(device: torch.device) -> pk.manidp.GatedView:
    return pk.manidp.GatedView.of(on(device, network_with_gates))


def batches(device: torch.device, count: int = 200) -> Callable[[], Any]:
    return lambda: digits("train", count).batches(100, device=device)


def calibrated(device: torch.device) -> Any:
    view = view_of(device)
    found = pk.manidp.calibrate(view, batches(device), 0.7 * view.cost.dense, "70%")
    pk.manidp.use_budget(view.model, "70%")
    share = calibrate_kept(view, batches(device), 0.6)
    return found, share, view.model


def foreseen(device: torch.device) -> Any:
    model = on(device, network_with_gates)
    pk.manidp.foresee(model, images(device), 1.0)
    return model


def observed(device: torch.device) -> Any:
    view = view_of(device)
    record = pk.manidp.observe(view, batches(device)())
    rows = pk.manidp.measured_row("paper", view, digits())
    return [vars(one) for one in (record, rows)], view.cost.macs(torch.ones(2, len(view.cost.layers)))


def equally(device: torch.device) -> Any:
    view = view_of(device)
    with pk.manidp.equally_many(view, batches(device)()):
        return view.model(images(device, 4)).detach()


def static(device: torch.device) -> Any:
    view = view_of(device)
    for layer in view.layers.values():
        layer.gate.excite.bias.data[:2] = -1e3
    model, plan = pk.manidp.prune_static(view, pk.manidp.observe(view, batches(device)()))
    return model, plan.to_json()


def bucketed(device: torch.device) -> Any:
    view = view_of(device)
    right = pk.manidp.add_buckets(view, images(device, 80), 2)
    running = pk.manidp.bucketed(view.model)
    return right, running(images(device, 8)), running.macs


def exported_buckets(device: torch.device) -> Any:
    view = view_of(device)
    pk.manidp.add_buckets(view, images(device, 80), 2)
    return export_buckets(view.model, "pt2").parity.difference


def runtime(device: torch.device, name: str) -> Any:
    model = on(device, network_with_gates)
    pk.manidp.add_buckets(pk.manidp.GatedView.of(model), images(device, 80), 2)
    fast, _ = pk.manidp.accelerate(model, name)
    with torch.inference_mode():
        found = fast(images(device, 4))
    return found.double().round(decimals=4)  # layouts are chosen by their speed


def slow_ways(device: torch.device) -> Any:
    model = on(device, network_with_gates)
    x = pk.manidp.images_like(model, 3)
    with torch.inference_mode():
        masked = pk.manidp.masked(model, pk.manidp.GatedView.of(model).graph)(x)
        return masked.double().round(decimals=4), pk.manidp.dense(model)(x).double().round(decimals=4)


def timed(device: torch.device) -> Any:
    before = torch.ops.second_device.synchronised()
    found = pk.evaluate(on(device), digits(), latency=True, threads=1)
    waited = torch.ops.second_device.synchronised() - before
    assert found.latency_ms is not None
    assert waited == 0 if device == CPU else waited >= 40  # before and after each of the passes, which are 20 at least
    times = pk.in_turns({"one": lambda: None}, device, rounds=2)
    assert len(times["one"]) == 2
    return found.accuracy, found.loss, found.macs, found.answers


def to_latency(device: torch.device) -> Any:
    """The networks that are timed differ from time to time; what is proven is that they are on the device."""
    wide = partial(pk.load, "prunekit:vgg_digits", arch_args={"config": "32-M-32"})
    done = pk.slim(on(device, wide), target_latency="95%", latency_threads=1, restore="none")
    assert done.plan.notes["latency"]["device"] == str(device)
    return [p.dtype for p in done.model.parameters()][:1]


REPORTS = ("observe",)  # what is watched is kept on the CPU

MATRIX = torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.25, 0.0, 0.5], [0.0, 1.0, 0.0, 0.0, 0.0]])
FOLDED = pk.Plan(
    [PLAN.operations[0], Fold("features.3", "features.0", MATRIX, torch.tensor([0.0, 0, 1, 0, 0, -1, 0, 0.5]))]
)
REFITTED = pk.Plan([PLAN.operations[1], Refit("fc", {"bias": torch.linspace(-1, 1, 10)})])

WORK: dict[str, Work] = {
    **{f"prune by {name}": partial(pruned, name=name) for name in ("slim", "random", "l1-norm")},
    **{
        f"merge by {way}": partial(pruned, name="merge", restore=way)
        for way in ("paper", "none", "moments", "closed-form")
    },
    "merge by pivots": partial(pruned, name="merge", criterion="pivot", restore="paper"),
    "merge branches": partial(pruned, name="merge", make=branches),
    "slim all": partial(pruned, name="slim", scope="all", aggregate="mean", restore="none"),
    "slim from images": lambda d: pruned(d, "slim", images=images()),
    "merge from images": lambda d: pruned(d, "merge", images=images(d)),
    "merge from images, norms refitted": lambda d: pruned(d, "merge", images=images(), refit_bn=True),
    "merge branches from images": lambda d: pruned(d, "merge", branches, images=images()),
    "prune by taylor": lambda d: pruned(d, "taylor", images=list(digits("train").batches(16))),
    "prune branches by taylor": lambda d: pruned(d, "taylor", branches, images=list(digits("train").batches(16))),
    **{f"restore by {way}": partial(restored, way=way) for way in ("paper", "moments", "closed-form", "constants")},
    "restore from synthetic images": partial(restored, way="synthetic"),
    "restore from images": lambda d: restored(d, "calibrate", images=images()),
    "apply": partial(applied, plan=PLAN),
    "apply a fold": partial(applied, plan=FOLDED),
    "apply a refit": partial(applied, plan=REFITTED),
    "inspect": lambda d: (pk.inspect(on(d)).cost, [g.free for g in pk.inspect(on(d, branches)).groups]),
    "scores": by_scores,
    "sensitivity": lambda d: pk.sensitivity(on(d), pk.inspect(on(d)).graph, digits(), [0.5]),
    "evaluate": timed,
    "a latency as the goal": to_latency,
    "fit": fitted,
    "sweep": partial(swept, train_set=digits("train"), calibration=40),
    "save and load": saved,
    "export a program": partial(exported, kind="pt2"),
    "export, norms folded": partial(exported, kind="pt2", fold_bn=True),
    "data": data,
    "gates": gated_network,
    "calibrate": calibrated,
    "foresee": foreseen,
    "observe": observed,
    "equally many": equally,
    "never kept": static,
    "sub-networks": bucketed,
    "export sub-networks": exported_buckets,
    **{f"runtime {name}": partial(runtime, name=name) for name in ("masked", "gather", "buckets", "auto")},
    "runtimes to compare with": slow_ways,
}


SLOW = ("export, norms folded", "export sub-networks", "runtime gather", "runtime auto")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in WORK])
def test_what_the_cpu_gives(name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "never ran")
        torch.manual_seed(0)
        wanted = WORK[name](CPU)
        torch.manual_seed(0)
        found = WORK[name](device)
    same(found, wanted, None if name in REPORTS else device)
