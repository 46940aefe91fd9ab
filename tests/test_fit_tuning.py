"""Tuning in the time that a search has left: plans that fit, a clock that is kept, and networks that get better."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import prunekit as pk
from prunekit import api
from prunekit.evaluation.paired import Drop
from prunekit.evaluation.score import scored
from prunekit.spec import origin_of
from prunekit.tasks.sets import all_inputs
from prunekit.workflows.fitting import search
from prunekit.workflows.fitting.trials import Trial, smallest
from prunekit.workflows.fitting.tuned import TimeIsUpError, Tuner
from prunekit.workflows.fitting.tuning import MARGIN, Pace, next_tuning

GOAL = pk.DropGoal(0.05, 0.9)


@functools.cache
def trained() -> nn.Module:
    model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
    pk.train(model, pk.TrainConfig(epochs=4, lr=0.1, device="cpu"), pk.open_data("digits", "train"))
    return model.eval()


def trial(share: float, met: bool, epochs: int = 0) -> Trial:
    bound = 0.04 if met else 0.1
    cost = pk.Cost(int(1000 * share), int(1000 * share), 1)
    return Trial("merge", share, cost, Drop(100, 1, 0), bound, met, 1.0, epochs)


histories = st.lists(st.tuples(st.floats(0.06, 0.96), st.booleans(), st.integers(0, 9)), min_size=1, max_size=6)


@given(histories, st.floats(0, 1e4), st.floats(0.01, 1e3), st.floats(0, 100))
def test_a_plan_fits_into_the_time_and_leads_to_something_smaller(
    history: list[tuple[float, bool, int]], left: float, epoch: float, rest: float
) -> None:
    trials, pace = [trial(*one) for one in history], Pace(epoch, rest)
    plan = next_tuning(trials, GOAL, left, pace)
    if plan is None:
        return
    best = smallest(trials)
    assert plan.epochs >= 1
    assert plan.seconds(pace) <= MARGIN * left + 1e-6
    assert 0.05 <= plan.share < (best.share if best else 1.0)


@given(st.floats(0.06, 0.9), st.floats(0.2, 1.0))
def test_plans_close_in_on_the_smallest_size_that_tuning_reaches(start: float, factor: float) -> None:
    """With time enough, whatever size tuning can reach is found to two points of the MACs."""
    trials, truth = [trial(start, met=True), trial(max(0.05, start - 0.02), met=False)], factor * start
    while (plan := next_tuning(trials, GOAL, 1e6, Pace(1, 1))) is not None:
        assert plan.share not in [one.share for one in trials if one.epochs]
        trials.append(trial(plan.share, plan.share >= truth, plan.epochs))
        assert len(trials) < 25
    best = smallest(trials)
    assert best is not None
    assert best.share <= max(truth, 0.05 / 0.8) + 0.025


class FakeTime:
    """Seconds pass only where something says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


def searched(monkeypatch: pytest.MonkeyPatch, seconds: float, epoch: float, slower: float = 1.0) -> tuple[Any, float]:
    """A search in which a surgery takes 10 s and an epoch `slower` times as long as was measured; and how long."""
    clock, prune = FakeTime(), api.prune

    def pruned(*given: Any, **rest: Any) -> Any:
        clock.now += 10
        return prune(*given, **rest)

    def tuned(_: Tuner, model: nn.Module, epochs: int, deadline: float) -> None:
        del model
        for _epoch in range(epochs):
            clock.now += slower * epoch
            if clock.now > deadline:
                raise TimeIsUpError

    monkeypatch.setattr(search, "time", clock)
    monkeypatch.setattr(search.api, "prune", pruned)
    monkeypatch.setattr(Tuner, "tune", tuned)
    monkeypatch.setattr(Tuner, "seconds_of_an_epoch", lambda *_: epoch)
    train_set, held_out = pk.open_data("digits", "train"), pk.open_data("digits", "test")
    ways = [pk.Variant("merge", {"restore": "moments"})]
    done = pk.fit(trained(), held_out, GOAL, train_set=train_set, calibration=32, ways=ways, seconds=seconds)
    return done, clock.now - 1000


@pytest.mark.parametrize(("seconds", "slower"), [(200, 1.0), (400, 1.0), (400, 1.5)])
def test_the_time_is_used_and_kept(seconds: float, slower: float, monkeypatch: pytest.MonkeyPatch) -> None:
    done, took = searched(monkeypatch, seconds, 7.0, slower)
    tuned = [one for one in done.history if one.epochs]
    assert tuned
    assert took <= seconds + slower * 7  # what goes on past the end is given up at the next step
    assert done.trial.cost.macs == min(one.cost.macs for one in done.history if one.met)


def test_no_tuning_begins_that_cannot_end(monkeypatch: pytest.MonkeyPatch) -> None:
    done, took = searched(monkeypatch, 200, 500.0)
    assert not any(one.epochs for one in done.history)
    assert took <= 200


def test_little_time_still_ends_with_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    done, _ = searched(monkeypatch, 1, 7.0)
    assert done.trial.met


def test_tuning_makes_a_network_better_and_is_remembered() -> None:
    train_set, held_out = pk.open_data("digits", "train"), pk.open_data("digits", "test")
    small = pk.merge(trained(), ratio=0.5, restore="none").model
    before = scored(small, held_out).value
    tuner = Tuner.of(trained(), train_set, "cpu")
    rest, tenth = ({bytes(image.numpy()) for image in all_inputs(part)} for part in (tuner.train_set, tuner.val_set))
    assert not rest & tenth
    tuner.tune(small, 2, time.perf_counter() + 1000)
    assert scored(small, held_out).value > before
    origin = origin_of(small)
    assert origin is not None
    assert [step["method"] for step in origin.history][-2:] == ["merge", "train"]
    assert tuner.seconds_of_an_epoch(small) > 0


def test_tuning_ends_with_the_time() -> None:
    small = pk.merge(trained(), ratio=0.5).model
    with pytest.raises(TimeIsUpError):
        Tuner.of(trained(), pk.open_data("digits", "train"), "cpu").tune(small, 50, time.perf_counter())
