"""Gated networks for many budgets: elastic training, and the thresholds and statistics that each budget has."""

from __future__ import annotations

import copy
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit as pk
import schemas
from prunekit.cli.app import run
from prunekit.data import ImageSet, open_data
from prunekit.errors import InputError, Interrupted
from prunekit.methods.manidp.budgets import GateState, calibrate, calibrate_all, use_budget
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.costs import share_for
from prunekit.methods.manidp.elastic import ElasticObjective, stored_budgets
from prunekit.methods.manidp.fit import GateTrainResult, add_gates, fit
from prunekit.methods.manidp.record import observe
from prunekit.methods.manidp.runtimes.buckets import add_buckets, bucketed
from prunekit.methods.manidp.static import prune_static
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import gated_layers
from prunekit.nn.norms import NAME, NormTable, present_norms, table_of
from prunekit.tasks.classification import CLASSIFICATION
from prunekit.tasks.sets import labelled_batches
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import Event
from prunekit.training.world import World

SETTINGS: dict[str, Any] = {"epochs": 5, "batch_size": 64, "lr": 0.05, "device": "cpu", "augment": "none"}
ELASTIC = GateRecipe(budgets="40%-80%")


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_data("digits", "train")


@pytest.fixture(scope="module")
def dense(digits: ImageSet) -> nn.Module:
    torch.manual_seed(0)
    model = pk.load("prunekit:vgg_digits", arch_args={"config": "16-16-M-24-24-M-32"})
    train(model, TrainConfig(**SETTINGS), digits)
    return model.eval()


@pytest.fixture(scope="module")
def elastic(dense: nn.Module, digits: ImageSet) -> tuple[nn.Module, GateTrainResult]:
    gated = add_gates(dense, ELASTIC)
    config = TrainConfig(**{**SETTINGS, "epochs": 3, "lr": 0.01}, match=25.0, distill=0.9)
    return gated.eval(), fit(gated, ELASTIC, config, digits, open_data("digits", "val"), teacher=dense)


def reloaded(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    pk.save(model, stream)
    stream.seek(0)
    return pk.load(stream)


def test_one_file_serves_every_budget(elastic: tuple[nn.Module, GateTrainResult]) -> None:
    model, result = elastic
    assert list(result.budgets) == ["60%", "40%", "45%", "50%", "55%", "65%", "70%", "75%", "80%"]
    again, test = reloaded(model).eval(), open_data("digits", "test")
    view = GatedView.of(again)
    for name, budget in result.budgets.items():
        assert budget.realised == pytest.approx(budget.target, rel=0.01)
        assert budget.score is not None
        assert budget.score > 0.85
        use_budget(again, name)
        found = observe(view, test.batches(250))
        assert found.mean_macs / view.cost.dense == pytest.approx(budget.target, rel=0.05)
        assert found.accuracy > 0.85
    assert result.score == result.budgets["60%"].score


def test_statistics_belong_to_a_budget(elastic: tuple[nn.Module, GateTrainResult]) -> None:
    """With those of another budget the same thresholds answer otherwise."""
    model = copy.deepcopy(elastic[0])
    use_budget(model, "80%")
    wide = present_norms(model)
    use_budget(model, "40%")
    assert not torch.allclose(present_norms(model)[0], wide[0], atol=1e-3)
    use_budget(model, "80%")
    assert all(torch.equal(a, b) for a, b in zip(present_norms(model), wide, strict=True))


def test_a_budget_does_not_depend_on_the_ones_before(dense: nn.Module, digits: ImageSet) -> None:
    recipe = GateRecipe(start="informed", keep=0.7)
    gated = add_gates(dense, recipe)
    fit(gated, recipe, TrainConfig(**{**SETTINGS, "epochs": 1, "lr": 0.01}), digits)
    images = digits.sample(400)
    dense_macs, found = GatedView.of(gated.eval()).cost.dense, []
    for names in (("60%", "40%"), ("40%",)):
        view = GatedView.of(copy.deepcopy(gated))
        targets = {name: float(name[:-1]) / 100 * dense_macs for name in names}
        results = calibrate_all(view, lambda: images.batches(200), targets)
        assert all(float(layer.threshold) == layer.budgets[names[0]] for layer in view.layers.values())
        use_budget(view.model, "40%")
        found.append((results["40%"], present_norms(view.model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_where_thresholds_stay_statistics_stay(elastic: tuple[nn.Module, GateTrainResult], digits: ImageSet) -> None:
    model, images = copy.deepcopy(elastic[0]), digits.sample(400)
    view = GatedView.of(model)
    before, macs = GateState.of(view), observe(view, images.batches(200)).mean_macs
    calibrate(view, lambda: images.batches(200), macs, "same")
    mean, variance = present_norms(model)
    assert torch.allclose(mean, before.norms[0], rtol=0.02, atol=0.02)
    assert torch.allclose(variance, before.norms[1], rtol=0.05)


def test_a_budget_that_fails_changes_nothing(elastic: tuple[nn.Module, GateTrainResult], digits: ImageSet) -> None:
    model = copy.deepcopy(elastic[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    view = GatedView.of(model)
    with pytest.raises(InputError, match="no thresholds give"):
        calibrate(view, lambda: digits.batches(250), 0.5 * view.cost.least, "tiny")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_channels_that_go_leave_the_tables(dense: nn.Module, digits: ImageSet) -> None:
    """Sub-networks and statistics of budgets lose the columns of removed channels, and compute what they did."""
    recipe = GateRecipe(start="informed", keep=0.6, ease=0)
    gated = add_gates(dense, recipe)
    fit(gated, recipe, TrainConfig(**{**SETTINGS, "epochs": 1, "lr": 0.001}), digits)
    view = GatedView.of(gated.eval())
    images = next(digits.batches(600))[0]
    calibrate_all(view, lambda: digits.batches(250), {"50%": 0.5 * view.cost.dense, "40%": 0.4 * view.cost.dense})
    add_buckets(view, images, 2)
    record = observe(view, digits.batches(250))
    small, plan = prune_static(view, record)
    assert plan.keeps
    table, whole = table_of(small), table_of(gated)
    assert table is not None
    assert whole is not None
    assert table.means.size(1) < whole.means.size(1)
    again = reloaded(small).eval()
    with torch.no_grad():
        for name in ("50%", "40%"):
            use_budget(again, name)
            use_budget(small.eval(), name)
            assert torch.equal(again(images), small(images))
        use_budget(gated, "50%")
        use_budget(small, "50%")
        assert torch.allclose(small(images), gated(images), atol=1e-4)
        assert torch.allclose(bucketed(small)(images), bucketed(gated)(images), atol=1e-3)


def test_a_step_has_a_budget_of_its_own(dense: nn.Module, digits: ImageSet) -> None:
    gated = add_gates(dense, ELASTIC)
    view = GatedView.of(gated)
    aim = ElasticObjective(gated.train(), TrainConfig(), None, CLASSIFICATION, ELASTIC, view.cost)
    try:
        assert [aim._place(step) for step in (0, 2, 4, 6)] == [0, 1, 0, 1]
        drawn = [aim._place(step) for step in range(1, 400, 2)]
        assert min(drawn) < 0.1
        assert max(drawn) > 0.9
        assert aim._place(7) == drawn[3]
        batches, world = labelled_batches(digits, 64), World(0, 1, torch.device("cpu"))
        seen = []
        for _, layer in gated_layers(gated):  # saliencies that differ, as after some training
            nn.init.normal_(layer.gate.excite.weight, std=0.3)
        for step in range(60):
            images, labels = next(batches) if step % 15 else next(batches := labelled_batches(digits, 64))
            aim(gated, (images, labels))
            seen.append(dict(aim.figures())["macs"])
            aim.end_step(step / 60, 1, world)
        own = torch.tensor(seen) * torch.arange(1, 61) - torch.cat(
            [torch.zeros(1), (torch.tensor(seen) * torch.arange(1, 61))[:-1]]
        )  # figures are means over the images so far
        smallest, largest = own[24::4].mean(), own[26::4].mean()
        assert smallest == pytest.approx(0.4, abs=0.06)
        assert largest == pytest.approx(0.8, abs=0.06)
    finally:
        aim.close()


@pytest.mark.parametrize("moment", [4, 9])
def test_an_interrupted_run_for_budgets_goes_on(
    dense: nn.Module, digits: ImageSet, tmp_path: Path, moment: int
) -> None:
    few, config = digits.sample(256), TrainConfig(**{**SETTINGS, "epochs": 3, "log_every": 1})
    whole = add_gates(dense, ELASTIC)
    fit(whole, ELASTIC, config, few)
    seen = 0

    def stop(_: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            signal.raise_signal(signal.SIGINT)

    state = tmp_path / "run.state"
    with pytest.raises(Interrupted):
        fit(add_gates(dense, ELASTIC), ELASTIC, config, few, state_path=state, on_event=stop)
    again = add_gates(dense, ELASTIC)
    fit(again, ELASTIC, config, few, state_path=state, resume=True)
    for (name, value), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_which_budgets_are_stored() -> None:
    assert list(stored_budgets(0.35, 0.5)) == ["45%", "35%", "40%", "50%"]
    assert list(stored_budgets(0.33, 0.41)) == ["40%", "33%", "35%", "41%"]
    assert list(stored_budgets(0.41, 0.42)) == ["42%", "41%"]


@pytest.mark.parametrize("macs", [0.2, 0.5, 0.9])
def test_the_share_of_channels_for_macs(dense: nn.Module, macs: float) -> None:
    cost = GatedView.of(add_gates(dense, GateRecipe())).cost
    kept = torch.tensor(cost.channels, dtype=torch.float64) * share_for(cost, macs)
    assert float(cost.macs(kept.unsqueeze(0))) == pytest.approx(macs * cost.dense, rel=1e-6)


@pytest.mark.parametrize("text", ["80%-35%", "35", "35%", "0%-50%", "35%-180%", "a-b", "0.35-0.8"])
def test_ranges_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="must be a range of the MACs such as 35%-80%"):
        GateRecipe(budgets=text)
    assert run(["manidp", "train", "m.pt", "--data", "digits", "--budgets", text]) == 2
    assert "--budgets must be a range" in capsys.readouterr().err


@pytest.mark.parametrize(
    "described",
    [{"budgets": ["a"] * 3, "channels": 5}, {"budgets": ["a"], "channels": 10**12}, {"budgets": 3}, {}, [1]],
)
def test_tables_that_no_weights_bear_out_are_refused(
    elastic: tuple[nn.Module, GateTrainResult], described: Any
) -> None:
    from prunekit.nn.norms import restore_norms

    shapes = {name: list(value.shape) for name, value in elastic[0].state_dict().items()}
    plain = add_gates(pk.load("prunekit:vgg_digits"), GateRecipe())
    with pytest.raises(InputError, match="statistics of budgets that cannot be"):
        restore_norms(plain, described, shapes)
    assert not hasattr(plain, NAME)


def test_exports_leave_the_table_out(elastic: tuple[nn.Module, GateTrainResult], tmp_path: Path) -> None:
    model: nn.Module = elastic[0]
    assert isinstance(getattr(model, NAME), NormTable)
    file = pk.export(model, tmp_path / "net.pt2")
    assert file is not None
    loaded = torch.export.load(str(tmp_path / "net.pt2"))
    assert not any(NAME in name for name in loaded.state_dict)
    x: Tensor = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(loaded.module()(x), model(x), atol=1e-5)


def test_budgets_in_a_sweep_are_refused(dense: nn.Module, digits: ImageSet) -> None:
    variant = pk.Variant("manidp", {"budgets": "35%-80%"})
    (point,) = pk.sweep(
        dense, [variant], [0.5], lambda model, _: pk.evaluate(model), train_set=digits, tuning=TrainConfig(**SETTINGS)
    )
    assert "trains gates for each of its budgets by itself" in str(point.error)


def test_training_for_budgets_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", "digits", "--batch-size", "64", "--device", "cpu"]
    model, gated = str(tmp_path / "model.pt"), str(tmp_path / "gated.pt")
    arch = ["--arch", "vgg_digits", "--arch-args", "config=16-16-M-24"]
    assert run(["train", *arch, "--epochs", "2", *common, "-q", "-o", model]) == 0
    training = ["manidp", "train", model, "--epochs", "1", "--budgets", "50%-70%", *common, "-o", gated]
    capsys.readouterr()
    assert run([*training, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    schemas.check(found)
    assert set(found["budgets"]) == {"50%", "55%", "60%", "65%", "70%"}
    assert found["gates"]["start"] == "informed"
    assert (found["settings"]["distill"], found["settings"]["match"]) == (0.9, 25)
    assert run([*training, "--force"]) == 0
    shown = capsys.readouterr()
    assert "65%" in shown.out + shown.err
    assert run(["eval", gated, "--data", "digits", "--budget", "55%", "--no-latency", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gates"]["budget"] == "55%"
