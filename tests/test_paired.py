"""Drops of accuracy on the same images: the bound holds as often as it says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.errors import InputError
from prunekit.evaluation.answers import Answers, drop_between
from prunekit.evaluation.paired import Drop, images_needed


def answers(labels: list[int], named: list[int]) -> Answers:
    return Answers(("a", "b"), torch.tensor(labels), torch.tensor(named))


def test_a_drop_counts_discordant_images_alone() -> None:
    before = answers([0, 0, 1, 1, 1], [0, 1, 1, 1, 0])
    after = answers([0, 0, 1, 1, 1], [1, 0, 1, 0, 0])
    assert drop_between(before, after) == Drop(5, lost=2, gained=1)
    assert drop_between(before, after).share == pytest.approx(0.2)


def test_answers_to_other_images_are_refused() -> None:
    with pytest.raises(InputError, match="same images"):
        drop_between(answers([0, 1], [0, 1]), answers([1, 1], [0, 1]))


def test_the_bound_of_a_published_example() -> None:
    # Tango (1998), table III: 44 pairs, 0 and 1 discordant; the two-sided 95 % interval of the difference
    drop = Drop(44, lost=1, gained=0)
    assert drop.at_most(0.975) == pytest.approx(0.118, abs=5e-4)


@pytest.mark.parametrize(("lost", "gained"), [(0.03, 0.02), (0.01, 0.0), (0.005, 0.005), (0.2, 0.15)])
def test_the_bound_is_exceeded_as_rarely_as_it_says(lost: float, gained: float) -> None:
    generator, drop = np.random.default_rng(0), lost - gained
    drawn = generator.multinomial(500, [lost, gained, 1 - lost - gained], size=20_000)
    found, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    held = [Drop(500, int(b), int(c)).at_most(0.9) >= drop for b, c in found]
    assert np.average(held, weights=times) > 0.86  # counts are whole numbers: the level is met on average


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1), st.floats(0.51, 0.999))
def test_a_bound_lies_above_the_drop_and_grows_with_confidence(
    images: int, lost: float, gained: float, confidence: float
) -> None:
    first = int(lost * images)
    drop = Drop(images, first, int(gained * (images - first)))
    bound = drop.at_most(confidence)
    assert drop.share <= bound <= 1
    assert drop.at_most(min(0.9999, confidence + 0.0005)) >= bound - 1e-9
    assert Drop(10 * images, 10 * drop.lost, 10 * drop.gained).at_most(confidence) <= bound + 1e-9


@given(st.floats(0.002, 0.5), st.floats(0.6, 0.999))
def test_so_many_images_are_needed_and_no_fewer(drop: float, confidence: float) -> None:
    needed = images_needed(drop, confidence)
    assert Drop(needed, 0, 0).at_most(confidence) <= drop + 1e-9
    assert needed == 1 or Drop(math.floor(0.98 * needed) - 1 or 1, 0, 0).at_most(confidence) > drop


def test_a_confidence_out_of_range_is_told() -> None:
    with pytest.raises(InputError, match="between"):
        Drop(10, 1, 0).at_most(95)
