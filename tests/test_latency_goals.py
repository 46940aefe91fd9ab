"""A latency as a budget: goals read, widths searched by a model of time and corrected by a clock, both made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import prunekit as pk
from prunekit.methods.budget import check_budget, read_budget
from prunekit.methods.goal import LatencyGoal, latency_within, read_latency
from prunekit.methods.search import CLOSE, TRIES, steps_by_meter, steps_within
from prunekit.surgery import predict

MODEL = pk.load("prunekit:resnet20")
GRAPH = pk.inspect(MODEL).graph
WHOLE = predict(GRAPH, GRAPH.kept_classes({}))
PRESENT = 10.0


def predicted(graph: Any, kept: Any) -> dict[str, float]:
    """A pure function of widths: a tenth of the time is fixed, the rest goes by MACs."""
    return {"fc": 0.1 * PRESENT, "the rest": 0.9 * PRESENT * predict(graph, kept).macs / WHOLE.macs}


def total(keeps: Mapping[str, Sequence[int]]) -> float:
    return sum(predicted(GRAPH, GRAPH.kept_classes(keeps)).values())


def goal(amount: float, measure: Callable[[Any], float] = total, block: int = 1) -> LatencyGoal:
    return LatencyGoal(amount, PRESENT, predicted, measure, block)


def ascending() -> dict[str, NDArray[np.float64]]:
    return {group.name: np.arange(group.size, dtype=float) for group in GRAPH.groups}


LIMIT = sum(group.size - 1 for group in GRAPH.groups if group.free)


def keeps_after(step: int) -> dict[str, list[int]]:
    """What is left when channels go one by one, the same share of each group."""
    order = sorted(
        (unit / group.size, group.name) for group in GRAPH.groups if group.free for unit in range(1, group.size)
    )
    gone = [name for _, name in order[:step]]
    return {group.name: list(range(gone.count(group.name), group.size)) for group in GRAPH.groups if group.free}


def kept_by(plan: pk.Plan) -> dict[str, tuple[int, ...]]:
    return {keep.group: tuple(keep.index) for keep in plan.keeps}


@pytest.mark.parametrize("amount", [8.0, 6.0, 4.0])
def test_scores_meet_a_latency_exactly_by_the_meter(amount: float) -> None:
    plan = pk.plan_by_scores(GRAPH, ascending(), pk.Config(target_latency=goal(amount)))
    kept = kept_by(plan)
    assert 0.97 * amount < total(kept) <= amount
    # the same widths as the budget that stands behind this meter
    macs = (amount / PRESENT - 0.1) / 0.9 * WHOLE.macs
    assert kept == kept_by(pk.plan_by_scores(GRAPH, ascending(), pk.Config(target_macs=macs)))


@pytest.mark.parametrize("chosen", [{"restore": "none"}, {"restore": "moments"}, {"restore": "none", "scope": "all"}])
def test_merge_meets_a_latency_by_the_meter(chosen: dict[str, Any]) -> None:
    config = _merge(target_latency=goal(7.0), **chosen)
    plan = _method("merge").plan(MODEL, GRAPH, config)
    assert 0.94 * 7.0 <= total(kept_by(plan)) <= 7.0


def test_slim_meets_a_latency_by_the_meter() -> None:
    method = _method("slim")
    plan = method.plan(MODEL, GRAPH, method.Config(target_latency=goal(7.0)))
    assert 0.94 * 7.0 <= total(kept_by(plan)) <= 7.0


def test_widths_by_loss_count_what_is_saved_in_milliseconds() -> None:
    """Where only one layer takes time, only that one is narrowed."""

    def alone(graph: Any, kept: Any) -> dict[str, float]:
        width = graph.sizes(kept)["layer3.1.conv1.weight", 0]
        return {"layer3.1.conv1": PRESENT * width / 64}

    asked = LatencyGoal(7.5, PRESENT, alone, lambda _: 7.4)
    plan = _method("merge").plan(MODEL, GRAPH, _merge(target_latency=asked, restore="moments"))
    assert {name: len(index) for name, index in kept_by(plan).items()} == {"layer3.1.conv1": 48}


@pytest.mark.parametrize("block", [8, 16])
def test_the_last_block_of_a_layer_is_full(block: int) -> None:
    plan = pk.plan_by_scores(GRAPH, ascending(), pk.Config(target_latency=goal(6.0, block=block)))
    widths = [len(index) for index in kept_by(plan).values()]
    assert all(width % block == 0 or width <= block for width in widths)
    asked = pk.Config(target_latency=goal(6.0, block=block), round_to=5)
    assert {len(index) % 5 for index in kept_by(pk.plan_by_scores(GRAPH, ascending(), asked)).values()} == {0}


@settings(max_examples=25)
@given(st.floats(0.7, 1.4), st.floats(0.0, 0.2), st.floats(3.5, 9.0))
def test_the_clock_corrects_the_model(slope: float, fixed: float, amount: float) -> None:
    """A clock that runs otherwise than the model says: the search ends where it is right, in a few tries."""
    calls: list[int] = []

    def measure(keeps: Mapping[str, Sequence[int]]) -> float:
        calls.append(1)
        part = total(keeps) / PRESENT
        return PRESENT * (fixed + (1 - fixed) * part**slope)

    budget = read_budget(pk.Config(target_latency=goal(amount, measure)), WHOLE)
    step = steps_within(GRAPH, budget, LIMIT, keeps_after)
    assert len(calls) <= TRIES

    def is_close(step: int) -> bool:
        return CLOSE[0] <= measure(keeps_after(step)) / amount - 1 <= CLOSE[1]

    assert is_close(step) or not (is_close(step - 1) or is_close(step + 1))  # one unit may be more than is close
    assert 0.9 < measure(keeps_after(step)) / amount < 1.1


def test_a_model_that_is_right_is_measured_once() -> None:
    calls: list[float] = []

    def measure(keeps: Mapping[str, Sequence[int]]) -> float:
        calls.append(total(keeps))
        return calls[-1]

    pk.plan_by_scores(GRAPH, ascending(), pk.Config(target_latency=goal(6.0, measure)))
    assert len(calls) == 1


def test_the_floor_names_what_takes_the_time() -> None:
    config = pk.Config(target_latency=goal(0.5))
    with pytest.raises(
        pk.InputError, match=r"removing all that may go leaves 1\.\d+ ms, most of it in fc 1 ms"
    ) as error:
        pk.plan_by_scores(GRAPH, ascending(), config)
    assert "ask for more than 1." in str(error.value.hint)
    with pytest.raises(pk.InputError, match="leaves 9 ms"):  # the clock says so, where the model hopes for more
        pk.plan_by_scores(GRAPH, ascending(), pk.Config(target_latency=goal(3.0, lambda _: 9.0)))


@pytest.mark.parametrize(
    ("text", "found"), [("5ms", (5.0, "ms")), ("0.005 s", (5.0, "ms")), ("500us", (0.5, "ms")), ("60%", (60.0, "%"))]
)
def test_latencies_are_read(text: str, found: tuple[float, str]) -> None:
    assert read_latency(text) == (pytest.approx(found[0]), found[1])
    assert check_budget(pk.Config(target_latency=text)) == "target_latency"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("60", "did you mean 60ms, or 60%"),
        ("0.6", "did you mean 0.6ms, or 60%"),
        ("0ms", "no network answers in no time"),
        ("0%", "between 0 and 100%"),
        ("100%", "between 0 and 100%"),
        ("-5ms", "takes a time like 5ms"),
        ("soon", "takes a time like 5ms"),
        ("5 minutes", "takes a time like 5ms"),
    ],
)
def test_other_latencies_are_refused(text: str, message: str) -> None:
    with pytest.raises(pk.InputError, match=message) as error:
        check_budget(pk.Config(target_latency=text))
    assert "--target-latency" in error.value.message


def test_a_latency_above_the_present_one_is_refused() -> None:
    assert latency_within("60%", 10.0) == 6.0
    with pytest.raises(pk.InputError, match="already takes 10 ms"):
        latency_within("12ms", 10.0)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"target_latency": "60%", "ratio": 0.5}, "found --ratio and --target-latency"),
        ({}, "--ratio, --target-macs, --target-params and --target-latency is needed; found none"),
        ({"ratio": 0.5, "latency_on": "onnx"}, "--latency-on says how a latency is measured"),
        ({"target_macs": "50%", "latency_threads": 1}, "--latency-threads says"),
    ],
)
def test_exactly_one_goal(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(pk.InputError, match=message):
        check_budget(pk.Config(**chosen))


@pytest.mark.parametrize("chosen", [{"latency_batch": 0}, {"latency_threads": -1}, {"latency_on": "tvm"}])
def test_conditions_that_are_none_are_refused(chosen: dict[str, Any]) -> None:
    with pytest.raises(pk.InputError, match="latency-"):
        pk.Config(target_latency="60%", **chosen)


def test_a_method_alone_cannot_time_a_network() -> None:
    with pytest.raises(pk.InputError, match="only where the network can be timed"):
        pk.plan_by_scores(GRAPH, ascending(), pk.Config(target_latency="60%"))


def test_the_meter_alone_measures_nothing() -> None:
    def measure(_: object) -> float:
        raise AssertionError

    budget = read_budget(pk.Config(target_latency=goal(6.0, measure)), WHOLE)
    step = steps_by_meter(GRAPH, budget, 60, lambda k: {"layer3.0.conv2": list(range(64 - k))})
    assert 0 < step < 60


def _method(name: str) -> pk.Method:
    from prunekit.methods import registry

    return registry.get(name)


def _merge(**settings: Any) -> Any:
    return dataclasses.replace(_method("merge").Config(), **settings)
