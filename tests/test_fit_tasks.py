"""`fit` on tasks other than the classification of images: the drop of any score, and how sure it is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import prunekit as pk
from commands import Capture, call, document
from prunekit.evaluation import drops
from prunekit.evaluation.paired import ScoreDrop, drop_from_json
from prunekit.metric import Metric
from prunekit.workflows.fitting.holding_out import hold_out
from test_segmentation import NET, draw


@pytest.mark.parametrize(
    ("parts", "confidence", "quantile"), [(20, 0.95, 1.7291), (8, 0.95, 1.8946), (8, 0.99, 2.9980), (20, 0.9, 1.3277)]
)
def test_the_bound_is_that_of_students_distribution(parts: int, confidence: float, quantile: float) -> None:
    assert ScoreDrop(100, parts, 0.0, 1.0).at_most(confidence) == pytest.approx(quantile, abs=5e-3)


def test_the_bound_holds_as_often_as_it_says() -> None:
    draw_from = np.random.default_rng(0)
    lost = draw_from.normal(0.02, 0.05, (4000, drops.PARTS))
    found = [ScoreDrop(200, drops.PARTS, float(x.mean()), float(x.std(ddof=1)) / drops.PARTS**0.5) for x in lost]
    assert np.mean([drop.at_most(0.95) >= 0.02 for drop in found]) == pytest.approx(0.95, abs=0.015)


def test_drops_are_stored() -> None:
    for drop in (ScoreDrop(100, 20, 0.01, 0.002), pk.Drop(100, 3, 1)):
        assert drop_from_json(drop.to_json()) == drop


@pytest.mark.parametrize(
    ("metric", "after", "lost"),
    [
        (Metric("mean IoU", "%"), 0.75, 0.05),
        (Metric("error", "px", higher_is_better=False), 0.9, 0.125),
        (Metric("gain", "dB"), 0.6, 0.25),
    ],
)
def test_points_of_shares_and_percent_of_other_scores(metric: Metric, after: float, lost: float) -> None:
    assert metric.lost(0.8, after) / drops.scale_of(metric, 0.8) == pytest.approx(lost)
    assert drops.left_after(metric, 0.8, lost) == pytest.approx(after)


class Loudness(pk.Task):
    """How loud a wave is; the score is an error, of which less is better."""

    score: ClassVar[str] = "error"
    higher_is_better: ClassVar[bool] = False

    def examples(self, split: str) -> Any:
        generator = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}[split])
        loud = 1 + torch.rand(120, 1, generator=generator)
        waves = loud * torch.sin(torch.arange(48) / 5 + torch.rand(120, 1, generator=generator))
        return TensorDataset(waves[:, None], loud)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def scores(self, model: nn.Module, batches: Iterator[Any]) -> Mapping[str, float]:
        return {"error": float(torch.cat([(model(x) - y).abs() for x, y in batches]).mean())}


@pytest.fixture(scope="module")
def ears() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv1d(1, 24, 5), nn.BatchNorm1d(24), nn.ReLU(), nn.Conv1d(24, 24, 3), nn.BatchNorm1d(24), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 1))
    task = Loudness()
    pk.train(model, pk.TrainConfig(epochs=6, lr=0.02, batch_size=20, device="cpu"), task.open("train"))
    return model


def test_an_error_grows_by_no_more_than_was_allowed(ears: nn.Module) -> None:
    task, tried = Loudness(), list[pk.Trial]()
    goal = pk.DropGoal.parse("40%")
    found = pk.fit(
        ears,
        task.open("val"),
        goal,
        train_set=task.open("train"),
        ways=[pk.Variant("merge")],
        on_trial=lambda trial, _: tried.append(trial),
    )
    before, after = (pk.evaluate(one, task.open("val")).score for one in (ears, found.model))
    assert before is not None
    assert after is not None
    assert after <= 1.4 * before
    drop = found.trial.drop
    assert isinstance(drop, ScoreDrop)
    assert drop.share == pytest.approx((after - before) / before)
    assert drop.at_most(0.95) == found.trial.bound
    assert found.trial.cost is not None
    assert found.trial.cost.macs < found.before.macs
    assert [trial.met for trial in tried if trial.bound is not None] == [
        trial.bound <= goal.drop for trial in tried if trial.bound is not None
    ]
    assert all(pk.Trial.from_json(trial.to_json()) == trial for trial in tried)


def test_who_decides_and_who_reports() -> None:
    task = Loudness()
    apart = hold_out(task.open("val"), task.open("test"))
    assert apart.said == "120 validation examples decide, 120 test examples report"
    halves = hold_out(task.open("test"), task.open("test"))
    assert (len(halves.decide), len(halves.report)) == (60, 60)
    seen = torch.cat([x for x, _ in (*halves.decide.batches(), *halves.report.batches())])
    assert len(seen.unique(dim=0)) == 120


def test_too_few_examples(ears: nn.Module) -> None:
    with pytest.raises(pk.InputError, match="7 held-out examples are too few"):
        pk.fit(ears, Loudness().open("val").subset(range(7)), pk.DropGoal(0.1), train_set=Loudness().open("train"))


def test_commands_fit_a_segmentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "train", 40, 0)
    draw(tmp_path / "test", 32, 1)
    (tmp_path / "net.py").write_text(textwrap.dedent(NET), encoding="utf-8")
    task = ["--arch", "net.py:Net", "--task", "segmentation", "--data", "."]
    document(capsys, "train", *task, "--epochs", 6, "--lr", 0.1, "-o", "net.pt", "--batch-size", "6", "--device", "cpu")
    asked = ["--max-drop", "30%", "--methods", "merge", "-o", "small.pt", "--html", "fit.html"]
    found = document(capsys, "fit", "net.pt", *task, *asked)
    assert found["metric"]["name"] == "mean IoU"
    assert found["images"] == {"decide": 16, "report": 16}
    assert found["after"]["macs"] < found["before"]["macs"]
    assert found["drop"]["share"] == pytest.approx(found["before"]["score"] - found["after"]["score"])
    page = Path("fit.html").read_text(encoding="utf-8")
    assert "Mean IoU against MACs" in page
    assert "accuracy" not in page
    status, _, err = call(capsys, "merge", "net.pt", *task, "--max-drop", "30%", "-o", "other.pt")
    assert status == 0, err
    assert "16 images that did not decide" in " ".join(err.split())
