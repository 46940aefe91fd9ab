"""The search for the smallest network that meets a goal."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import prunekit as pk
from prunekit.errors import InputError
from prunekit.evaluation.paired import Drop
from prunekit.evaluation.score import scored
from prunekit.workflows.fitting.search import fit
from prunekit.workflows.fitting.sizes import FIRST, next_share
from prunekit.workflows.fitting.trials import Trial
from prunekit.workflows.goals import DropGoal
from prunekit.workflows.sweeps.points import Variant

GOAL = DropGoal(0.05, 0.9)


@functools.cache
def trained(widths: str = "16-M-24") -> nn.Module:
    train_set = pk.open_data("digits", "train")
    model = pk.load("prunekit:vgg_digits", arch_args={"config": widths})
    pk.train(model, pk.TrainConfig(epochs=4, lr=0.1, device="cpu"), train_set)
    return model.eval()


@functools.cache
def images() -> torch.Tensor:
    return next(pk.open_data("digits", "train").sample(100, seed=0).batches(100))[0]


def trial(share: float, bound: float | None, goal: DropGoal = GOAL) -> Trial:
    met = bound is not None and bound <= goal.drop
    return Trial("merge", share, None, None, bound, met, 0.0, error=None if bound is not None else "refused")


def test_the_smallest_network_within_the_goal_is_found_and_no_better_than_measured() -> None:
    held_out, before = pk.open_data("digits", "test"), scored(trained(), pk.open_data("digits", "test"))
    seen: list[tuple[Trial, nn.Module | None]] = []
    found = fit(
        trained(), held_out, GOAL, images=images(), ways=[Variant("merge")], on_trial=lambda *new: seen.append(new)
    )
    assert found.trial.met
    assert found.trial.cost is not None
    assert found.trial.cost.macs < 0.8 * found.before.macs
    now = scored(found.model, held_out).value  # measured again, by other code than decided
    assert found.trial.drop is not None
    assert before.value - now == pytest.approx(found.trial.drop.share)
    assert found.trial.drop.at_most(0.9) <= 0.05
    assert found.history == tuple(new for new, _ in seen)
    assert [model for _, model in seen if model is not None][-1] is found.model


def test_what_is_known_is_not_tried_again() -> None:
    held_out, ways = pk.open_data("digits", "test"), [Variant("merge")]
    first = fit(trained(), held_out, GOAL, images=images(), ways=ways)
    again = fit(
        *(trained(), held_out, GOAL),
        images=images(),
        ways=ways,
        known=first.history,
        kept=first.model,
        on_trial=lambda *_: pytest.fail("a trial"),
    )
    assert again.history == first.history
    assert again.model is first.model
    assert again.trial == first.trial


def test_a_network_that_is_lost_is_made_again() -> None:
    held_out, ways = pk.open_data("digits", "test"), [Variant("merge")]
    first = fit(trained(), held_out, GOAL, images=images(), ways=ways)
    made: list[Trial] = []
    again = fit(
        *(trained(), held_out, GOAL),
        images=images(),
        ways=ways,
        known=first.history,
        on_trial=lambda trial, _: made.append(trial),
    )
    assert [one.share for one in made] == [first.trial.share]
    assert again.trial.cost == first.trial.cost


@given(st.sampled_from(["way", "share", "cost", "drop", "bound", "met", "seconds", "epochs"]), st.data())
def test_what_is_no_trial_is_refused_or_read(key: str, data: st.DataObject) -> None:
    broken = Trial("merge", 0.5, pk.Cost(10, 20, 3), Drop(100, 3, 1), 0.05, met=True, seconds=1.5).to_json()
    broken[key] = data.draw(
        st.one_of(st.none(), st.text(), st.lists(st.integers()), st.dictionaries(st.text(), st.none()))
    )
    with contextlib.suppress(TypeError, KeyError, ValueError):
        next_share([Trial.from_json(broken)], GOAL)


def test_too_few_images_are_told_before_anything_is_tried() -> None:
    few = pk.open_data("digits", "test").sample(50)
    with pytest.raises(InputError, match="50 images") as error:
        fit(trained(), few, DropGoal(0.01), on_trial=lambda *_: pytest.fail("a trial"))
    assert error.value.hint is not None
    assert "268" in error.value.hint


def test_a_goal_that_cannot_be_met_names_the_nearest() -> None:
    fragile = trained("3-M-4")  # each channel counts
    with pytest.raises(InputError, match=r"nearest, merge:none to [\d.]+ % of the MACs, loses"):
        fit(fragile, pk.open_data("digits", "test"), DropGoal(0.008), ways=[Variant("merge", {"restore": "none"})])


def test_a_way_that_does_not_fit_is_left_and_none_that_fits_is_an_error() -> None:
    held_out = pk.open_data("digits", "test")
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(InputError, match=r"slim: .*batch norm"):
        fit(plain, held_out, GOAL, ways=[Variant("slim")])


def test_time_ends_the_search_once_there_is_something() -> None:
    found = fit(trained(), pk.open_data("digits", "test"), GOAL, images=images(), ways=[Variant("merge")], seconds=1e-6)
    assert len(found.history) == 1 or all(not before.met for before in found.history[:-1])


@given(st.floats(0.04, 0.99), st.floats(0.001, 0.2), st.floats(1, 6))
def test_the_search_ends_close_to_the_smallest_size(truth: float, scale: float, steepness: float) -> None:
    """Whatever falling curve of losses, the search brackets the share where the goal is met within two points."""

    def bound(share: float) -> float:
        return GOAL.drop + scale * ((truth / share) ** steepness - 1)

    trials: list[Trial] = [trial(FIRST, bound(FIRST))]
    while (share := next_share(trials, GOAL)) is not None:
        assert share not in [before.share for before in trials]
        trials.append(trial(share, bound(share)))
        assert len(trials) < 25
    met = [one.share for one in trials if one.met]
    if truth < 0.97:
        assert met
        assert min(met) - max(truth, 0.05) <= 0.05
    assert all(share >= truth - 1e-9 for share in met)


def test_sizes_that_are_refused_bound_the_search() -> None:
    trials = [trial(0.7, 0.0)]
    while (share := next_share(trials, GOAL)) is not None:
        trials.append(trial(share, None if share < 0.5 else 0.01))
        assert len(trials) < 20
    assert min(one.share for one in trials if one.met) < 0.53


@pytest.mark.parametrize("text", ["0", "0%", "-1%", "120%", "one", "1"])
def test_drops_that_make_no_sense_are_told(text: str) -> None:
    with pytest.raises(InputError, match="drop"):
        DropGoal.parse(text)


def test_a_trial_is_kept_as_json() -> None:
    one = Trial("merge", 0.5, pk.Cost(10, 20, 3), Drop(100, 3, 1), 0.05, met=True, seconds=1.5)
    assert Trial.from_json(one.to_json()) == one
