"""Sweeps: any budget as axis, seeds, tuning, restorations and gates as variants, faults, resuming, and the views."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prunekit
import schemas
from networks import lively
from prunekit import checkpoint, models
from prunekit.cli.app import run
from prunekit.cli.sweep_arguments import read_seeds, read_variants
from prunekit.data import open_data
from prunekit.errors import InputError, Interrupted
from prunekit.evaluation.score import EvalResult, evaluate
from prunekit.methods import registry
from prunekit.methods.base import Method
from prunekit.report.pages.sweeping import sweep_charts, sweep_page
from prunekit.report.pictures import png
from prunekit.report.pictures.chart import Axis, Chart, Point, Series, apart
from prunekit.report.terminal.sweeping import recommended, sweep_cells
from prunekit.training.config import TrainConfig
from prunekit.workflows.sweeps.making import Material, make
from prunekit.workflows.sweeps.points import SweepPoint, Variant
from prunekit.workflows.sweeps.running import sweep
from prunekit.workflows.sweeps.summary import Sweep, recommend, summarise

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("models") / "net.pt"
    checkpoint.save(lively(models.build("vgg_digits", {"config": "8-8-M-16", "width": 1})).float(), path)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def swept(capsys: Capture, network: Path, *flags: str, status: int = 0) -> dict[str, Any]:
    """The document of a sweep, which is also what its file holds."""
    capsys.readouterr()
    given = ["sweep", str(network), "--no-latency", "-o", "s.json", "--json", *flags]
    assert run(given) == status, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    schemas.check(found)
    assert json.loads(Path("s.json").read_text()) == found
    return found


def refused(capsys: Capture, network: Path, *flags: str) -> str:
    capsys.readouterr()
    assert run(["sweep", str(network), "--no-latency", "-o", "s.json", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) <= 2
    return captured.err


@pytest.mark.parametrize(("flag", "figure"), [("--target-macs", "macs"), ("--target-params", "params")])
def test_a_target_is_an_axis(flag: str, figure: str, network: Path, capsys: Capture) -> None:
    found = swept(capsys, network, flag, "75%,50%", "--methods", "l1-norm,merge:none")
    axis = flag.removeprefix("--").replace("-", "_")
    assert found["axis"] == axis
    for point in found["points"]:
        assert point["result"][figure] <= float(point[axis][:-1]) / 100 * found["base"][figure]
        assert point["ratio"] is None


def test_seeds_have_a_mean_and_a_deviation(network: Path, capsys: Capture) -> None:
    given = ["--data", "digits", "--ratios", "0.5", "--methods", "random"]
    found = swept(capsys, network, *given, "--seeds", "0,1,2")
    accuracies = [point["result"]["accuracy"] for point in found["points"]]
    assert [point["seed"] for point in found["points"]] == [0, 1, 2]
    assert len(set(accuracies)) > 1
    (summary,) = found["summary"]
    assert summary["accuracy"] == pytest.approx(statistics.fmean(accuracies))
    assert summary["deviation"] == pytest.approx(statistics.stdev(accuracies))
    alone = swept(capsys, network, *given, "--force", "--seeds", "1")
    assert alone["summary"][0]["deviation"] is None
    assert alone["points"][0]["result"] == found["points"][1]["result"]


def test_a_tuned_point_is_what_the_command_makes(network: Path, capsys: Capture) -> None:
    tuning = ["--epochs", "1", "--lr", "0.01", "--distill-share", "0.25"]
    data = ["--data", "digits", "--calibration", "64"]
    found = swept(capsys, network, *data, *tuning, "--ratios", "0.5", "--methods", "merge:none")
    assert run(["merge", str(network), "--ratio", ".5", "--restore", "none", *data, *tuning, "-o", "m.pt", "-q"]) == 0
    (point,) = found["points"]
    assert point["result"]["accuracy"] == evaluate(checkpoint.load("m.pt"), open_data("digits", "test")).accuracy
    assert point["kept"]["epochs"] == 1
    assert found["tuning"]["lr"] == 0.01


def test_gates_are_measured_by_their_mean_macs(network: Path, capsys: Capture) -> None:
    tuning = ["--data", "digits", "--epochs", "1", "--methods", "manidp:start=informed"]
    found = swept(capsys, network, *tuning, "--target-macs", "80%", "--calibration", "100")
    (point,) = found["points"]
    gates = point["result"]["gates"]
    assert point["result"]["macs"] == round(gates["macs_with_gates"]["mean"])
    assert point["result"]["macs"] == pytest.approx(0.8 * found["base"]["macs"], rel=0.05)
    kept = swept(capsys, network, *tuning, "--ratios", "0.3", "--force")["points"][0]["result"]["gates"]["kept"]
    assert 0 < kept < 1


def test_restorations_are_variants() -> None:
    found = read_variants(["slim,merge:moments,merge:restore=paper,lambda=1", "merge:none:min-channels=2,random"])
    assert [variant.label for variant in found] == [
        *("slim", "merge:moments", "merge:paper,lambda=1", "merge:none,min-channels=2", "random")
    ]
    assert found[2].settings == {"restore": "paper", "lam": 1.0}
    again = read_variants([",".join(variant.label for variant in found)])
    assert again == found


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["merge", "merge:moments", "slim:none", "random", "l1-norm:none", "taylor"]),
            st.dictionaries(st.sampled_from(["round-to", "min-channels"]), st.integers(1, 9)),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_labels_read_back_as_their_variants(given: list[tuple[str, dict[str, int]]]) -> None:
    texts = [
        name + (":" if settings else "") + ",".join(f"{k}={v}" for k, v in settings.items()) for name, settings in given
    ]
    found = read_variants([",".join(texts)])
    assert len(found) == len({variant.label for variant in found})
    assert read_variants([variant.label for variant in found]) == found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ratios", "0.5", "--target-macs", "50%"], "one axis, and --ratios and --target-macs are two"),
        (["--target-macs", "50"], "did you mean --target-macs 50%"),
        (["--target-params", ""], "has no amounts"),
        (["--methods", "sim"], "did you mean slim"),
        (["--methods", "manid"], "did you mean manidp"),
        (["--methods", "merge:moment"], "did you mean moments"),
        (["--methods", "manidp:moments"], "restores nothing"),
        (["--methods", ","], "names none"),
        (["--methods", "manidp:keep=.5"], "says how much is to go"),
        (["--methods", "manidp"], "takes epochs"),
        (
            ["--methods", "manidp", "--epochs", "1", "--data", "digits", "--target-params", "50%"],
            "remove no parameters",
        ),
        (["--methods", "taylor"], "reads labelled images"),
        (["--epochs", "1"], "tuning needs images"),
        (["--epochs", "1", "--data", "digits", "--lr", "-1"], "lr must be at least 0"),
        (["--seeds", "a"], "whole numbers"),
        (["--seeds", "0,-1"], "whole numbers"),
        (["--within", "-1"], "between 0 and 100"),
        (["--calibration", "0"], "at least 1"),
    ],
)
def test_bad_sweeps(flags: list[str], message: str, network: Path, here: Path, capsys: Capture) -> None:
    assert message in refused(capsys, network, *flags)
    assert not list(here.iterdir())


class Faulty(Method):
    """A plug-in with a fault that shows at some budgets only."""

    name: ClassVar[str] = "faulty"
    summary: ClassVar[str] = "Fail above a half."
    broken: ClassVar[bool] = True

    def plan(self, model: Any, graph: Any, config: Any, images: Any = None) -> Any:
        if config.ratio > 0.5 and self.broken:
            raise ZeroDivisionError("float division by zero")
        return registry.get("l1-norm").plan(model, graph, registry.get("l1-norm").Config(ratio=config.ratio), images)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    names, get = registry.names(), registry.get
    monkeypatch.setattr(registry, "names", lambda: sorted([*names, "faulty"]))
    monkeypatch.setattr(registry, "get", lambda name: Faulty() if name == "faulty" else get(name))
    return Faulty


def test_a_fault_of_one_method_does_not_cost_the_others(
    faulty: type[Faulty], network: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--ratios", "0.3,0.6", "--methods", "faulty,merge:none"]
    capsys.readouterr()
    assert run(["sweep", str(network), "--no-latency", "-o", "s.json", *given]) == 1
    captured = capsys.readouterr()
    assert "1 of 4 points have no figures" in captured.err
    assert "faulty 0.6 failed: ZeroDivisionError: float division by zero" in captured.err
    assert re.search(r"faulty +0\.6", captured.out)
    done = {(p["label"], p["ratio"]): p for p in json.loads(Path("s.json").read_text())["points"]}
    assert [key for key, point in done.items() if point["result"] is None] == [("faulty", 0.6)]
    monkeypatch.setattr(faulty, "broken", False)
    again = swept(capsys, network, "--resume")  # what is not said is as it was; failed points are tried again
    assert all(point["result"] for point in again["points"])
    assert len(again["points"]) == 4


def test_a_signal_is_no_fault_of_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise Interrupted("stopped")

    monkeypatch.setattr("prunekit.workflows.sweeps.running.make", stopped)
    with pytest.raises(Interrupted):
        sweep(models.build("lenet_300_100"), [Variant("merge")], [0.5], lambda *_: pytest.fail("measured"))


def test_what_is_stored_is_shown_again(network: Path, capsys: Capture) -> None:
    first = swept(capsys, network, "--ratios", "0.3,0.6", "--methods", "merge:none")
    more = swept(capsys, network, "--resume", "--ratios", "0.5", "--methods", "l1-norm", "--seeds", "0,1")
    assert more["points"][:2] == first["points"]
    assert [(p["label"], p["ratio"], p["seed"]) for p in more["points"][2:]] == [
        *(("l1-norm", 0.5, 0), ("l1-norm", 0.5, 1))
    ]
    capsys.readouterr()
    assert run(["sweep", str(network), "--no-latency", "-o", "s.json", "--resume", "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("merge:none | 0.3", "merge:none | 0.6", "l1-norm | 0.5", "unpruned"))


def test_resuming_says_which_settings_differ(network: Path, capsys: Capture) -> None:
    given = ["--data", "digits", "--methods", "merge:none", "--calibration", "64", "--ratios", "0.5"]
    tuning = ["--epochs", "1", "--lr", "0.01"]
    swept(capsys, network, *given, *tuning)
    other = refused(capsys, network, *given, "--epochs", "2", "--lr", "0.01", "--resume", "--calibration", "65")
    assert "other calibration (64 there, 65 now) and epochs (1 there, 2 now)" in other
    assert "lr" not in other
    assert "epochs (1 there, none now)" in refused(capsys, network, *given, "--resume")
    axis = [*given[:-2], "--target-macs", "50%"]
    assert "axis (ratio there, target_macs now)" in refused(capsys, network, *axis, *tuning, "--resume")


def test_a_method_that_cannot_be_loaded_is_left_out_of_the_defaults(
    network: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, get = registry.names(), registry.get

    def load(name: str) -> Method:
        if name == "broken":
            raise ImportError("no module named x")
        return get(name)

    monkeypatch.setattr(registry, "names", lambda: [*names, "broken"])
    monkeypatch.setattr(registry, "get", load)
    given = ["sweep", str(network), "--no-latency", "-o", "s.json", "--ratios", "0.5"]
    assert run(given) == 0
    captured = capsys.readouterr()
    assert "method broken is left out" in captured.err
    assert "broken" not in captured.out
    assert "taylor" not in captured.out


def result(accuracy: float | None, macs: int = 100, params: int = 10) -> EvalResult:
    return EvalResult("m", accuracy, None, None, 355, params, macs, 40, None)


def point(label: str, ratio: float, accuracy: float | None, macs: int = 50, seed: int = 0) -> SweepPoint:
    return SweepPoint(label, label, {}, ratio, result(accuracy, macs, macs // 10), None, 1.0, seed=seed)


def whole(points: Sequence[SweepPoint], accuracy: float | None = 0.95, within: float = 1.0) -> Sweep:
    return Sweep(result(accuracy), tuple(points), "ratio", "digits", "test", 0, within)


def test_the_smallest_near_enough_is_recommended() -> None:
    near = [point("a", 0.2, 0.95, 80), point("a", 0.4, 0.941, 60), point("b", 0.4, 0.94, 55), point("a", 0.6, 0.93, 40)]
    assert (
        "recommended: b at ratio 0.4, 94.00 % with 55 MACs (−45 %), of the fewest MACs within 1 point of"
        in recommended(whole(near))
    )
    assert "recommended: a at ratio 0.6" in recommended(whole(near, within=2))
    assert "nothing smaller comes within 1 point of the original's 99.00 %; the nearest is a at ratio 0.2" in (
        recommended(whole(near, accuracy=0.99))
    )
    assert "takes scores" in recommended(whole([point("a", 0.2, None)], accuracy=None))
    # a hair's breadth of size is worth no accuracy
    close = [point("random", 0.5, 0.941, 50), point("slim", 0.5, 0.95, 51), point("merge", 0.5, 0.95, 53)]
    assert "recommended: slim at ratio 0.5, 95.00 %" in recommended(whole(close))
    # one seed of two is not enough
    seeds = [point("a", 0.5, 0.945, seed=0), point("a", 0.5, 0.92, seed=1)]
    assert "nothing smaller" in recommended(whole(seeds))


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 3), st.floats(0, 1)),
        max_size=12,
        unique_by=lambda row: row[:3],
    ),
    st.floats(0, 1),
    st.floats(0, 100),
)
def test_a_recommendation_keeps_its_word(rows: list[tuple[str, float, int, float]], base: float, within: float) -> None:
    points = [point(label, ratio, accuracy, int(100 * (1 - ratio)), seed) for label, ratio, seed, accuracy in rows]
    summaries = summarise(points)
    assert sum(len(summary.points) for summary in summaries) == len(points)
    found = recommend(result(base), summaries, "ratio", within)
    if not points:
        assert found is None
        return
    assert found is not None
    near = [s for s in summaries if s.score is not None and s.score >= base - within / 100]
    if found.best is not None:
        assert math.isclose(max(base - within / 100, found.best.score or 0), found.best.score or 0, abs_tol=1e-6)
        assert all((found.best.macs or 0) <= 1.05 * (s.macs or 0) for s in near)
    else:
        assert not near
        assert found.nearest is not None
        assert all((s.score or 0) <= (found.nearest.score or 0) for s in summaries)


def test_every_view_says_where_the_figures_come_from() -> None:
    done = whole([point("a", 0.5, 0.94, seed=0), point("a", 0.5, 0.96, seed=3)])
    page = sweep_page("t", done)
    for fact in ("355 images of digits (test)", "seeds 0, 3", "not tuned", f"prunekit {prunekit.__version__}"):
        assert fact in page
    assert re.search(r"\d{4}-\d{2}-\d{2}", page)
    columns, rows = sweep_cells(done)
    assert columns[:4] == ["method", "ratio", "seeds", "accuracy"]
    assert rows[1][:4] == ("a", "0.5", "2", "95.00 ± 1.41 %")
    spread = [p.spread for p in sweep_charts(done)[0].series[0].points]
    assert spread == [0, pytest.approx(100 * statistics.stdev([0.94, 0.96]))]


def test_a_picture_has_its_small_print_within_its_edges(here: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chart = Chart("t", Axis("x"), Axis("y"), (Series("a", (Point(0, 1), Point(1, 2)), "line"),))
    kept: list[Figure] = []

    class Seen(Figure):
        def savefig(self, *args: Any, **kwargs: Any) -> None:
            kept.append(self)
            super().savefig(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(png, "require_matplotlib", lambda: Seen)
        png.draw(
            [chart],
            here / "a.png",
            title="path/" * 40 + "net.pt: a title",
            about="; ".join(["a long account of where the figures come from"] * 5),
        )
    (figure,) = kept
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert len(figure.texts) == 2
    for label in figure.texts:
        box = label.get_window_extent(renderer)
        assert "\\n" not in label.get_text()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_lines_that_would_hide_each_other_are_drawn_apart() -> None:
    start = Point(0, 100, fixed=True)
    lines = tuple(
        Series(name, (start, Point(1, 90), Point(2, y)), "line") for name, y in zip("abc", (80, 80, 70), strict=True)
    )
    chart = Chart("t", Axis("x"), Axis("y"), lines)
    moved = apart(chart).series
    assert moved[0] == lines[0]
    assert all(series.points[0] == start for series in moved)
    places = [series.points[1].x for series in moved]
    assert places == sorted(set(places))
    distant = Chart("t", Axis("x"), Axis("y"), (lines[0], Series("d", (start, Point(1, 50)), "line")))
    assert apart(distant) == distant


def test_taylor_is_the_derivative_of_the_loss_by_a_gate() -> None:
    """The score of a channel is the squared derivative of the loss by a factor behind its batch norm."""
    from prunekit.api import inspect
    from prunekit.methods.baselines.scores import taylor_scores

    model = lively(models.build("vgg_digits", {"config": "4-M-6", "width": 1})).double().eval()
    graph = inspect(model).graph
    inputs, labels = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.arange(8) % 10
    batches = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])]
    scores = taylor_scores(model, graph, batches)
    assert all(parameter.grad is None for parameter in model.parameters())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for group, norm in zip([g for g in graph.groups if g.free], norms, strict=False):
        expected = torch.zeros(group.size, dtype=torch.float64)
        for images, wanted in batches:
            gate = torch.ones(group.size, dtype=torch.float64, requires_grad=True)
            hook = norm.register_forward_hook(lambda _, __, out, gate=gate: out * gate[:, None, None])
            torch.autograd.backward(torch.nn.functional.cross_entropy(model(images), wanted))
            hook.remove()
            assert gate.grad is not None
            expected += gate.grad**2 / len(batches)
        torch.testing.assert_close(torch.from_numpy(scores[group.name]), expected)


@pytest.mark.parametrize("images", [None, torch.zeros(4, 1, 8, 8), [torch.zeros(4, 1, 8, 8)], []])
def test_taylor_needs_labels(images: Any) -> None:
    model = models.build("vgg_digits", {"config": "4-M-6", "width": 1})
    with pytest.raises(InputError, match="labelled images"):
        prunekit.prune("taylor", model, torch.zeros(1, 1, 8, 8), images=images, ratio=0.5)


@pytest.mark.parametrize("name", ["random", "l1-norm", "taylor"])
def test_baselines_restore_only_where_asked(name: str) -> None:
    model = lively(models.build("vgg_digits", {"config": "8-M-8", "width": 1})).float()
    batches = [(torch.randn(64, 1, 8, 8), torch.arange(64) % 10)]
    images: Any = batches if name == "taylor" else batches[0][0]
    plain = prunekit.prune(name, model, torch.zeros(1, 1, 8, 8), images=images, ratio=0.5)
    refitted = prunekit.prune(name, model, torch.zeros(1, 1, 8, 8), images=images, ratio=0.5, restore="calibrate")
    assert not plain.plan.folds
    assert not plain.plan.refits
    assert refitted.plan.refits or refitted.plan.folds
    assert [keep.index for keep in plain.plan.keeps] == [keep.index for keep in refitted.plan.keeps]


def test_l1_norm_takes_the_same_share_of_every_layer() -> None:
    model = models.build("vgg_digits", {"config": "8-8-M-16", "width": 1})
    plan = prunekit.prune("l1-norm", model, torch.zeros(1, 1, 8, 8), ratio=0.5).plan
    assert [len(keep.index) for keep in plan.keeps] == [4, 4, 8]


def test_a_seed_of_a_variant_is_its_own() -> None:
    model = models.build("vgg_digits", {"config": "8-8-M-16", "width": 1})
    checkpoint.save(model, "m.pt")
    material = Material(checkpoint.load("m.pt"))

    def kept(variant: Variant, seed: int) -> list[torch.Tensor]:
        return [p.detach() for p in make(material, variant, "ratio", 0.5, seed).model.parameters()]

    free, tied = Variant("random"), Variant("random", {"seed": 5})
    assert not all(map(torch.equal, kept(free, 0), kept(free, 1)))
    assert all(map(torch.equal, kept(tied, 0), kept(tied, 1)))
    assert all(map(torch.equal, kept(tied, 0), kept(free, 5)))


def test_seeds() -> None:
    assert read_seeds("0, 2,1,2") == (0, 2, 1)


def test_tuning_in_python() -> None:
    train_set, val_set = (open_data("digits", split).sample(64, seed=0) for split in ("train", "val"))
    model = models.build("vgg_digits", {"config": "8-M-16", "width": 1})
    checkpoint.save(model, "m.pt")
    config = TrainConfig(epochs=1, device="cpu")
    points = sweep(
        checkpoint.load("m.pt"),
        [Variant("l1-norm")],
        ["60%"],
        lambda made, name: evaluate(made, name=name),
        axis="target_macs",
        train_set=train_set,
        val_set=val_set,
        tuning=config,
    )
    assert points[0].error is None
    assert points[0].kept is not None
    assert points[0].budget == ("target_macs", "60%")
