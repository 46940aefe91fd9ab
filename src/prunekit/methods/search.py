"""How many removals in a fixed order a budget needs: by what it counts, and for a latency also by the clock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from prunekit.errors import InputError
from prunekit.methods.budget import Budget, fewest
from prunekit.surgery import Graph

Keeps = TypeVar("Keeps", bound=Mapping[str, Sequence[int]])
Search = Callable[[Graph, Budget, int, Callable[[int], Any]], int]
"""A search for the number of steps: graph, budget, the limit, and what stays after so many."""

# A measured latency is close where it lies so much below or above the goal; corrections aim at the middle of that.
CLOSE = (-0.06, 0.015)
_AIM = 1 + sum(CLOSE) / 2
TRIES = 6  # the first, and five corrections
_NAMED = 4  # layers that a refusal names


def steps_by_meter(
    graph: Graph,
    budget: Budget,
    limit: int,
    keeps_at: Callable[[int], Keeps],
    biases: Callable[[Keeps], Collection[str]] = lambda _: (),
    further: Callable[[], str | None] = lambda: None,
) -> int:
    """Return the fewest steps, `limit` at most, whose network is within the budget by what it counts or predicts.

    Args:
        graph: The network.
        budget: The target: anything but a ratio.
        limit: All steps that there are.
        keeps_at: What stays after so many steps; it must not cost more than before.
        biases: The layers that get a bias then.
        further: What to do where these steps are not enough, asked only then.

    Raises:
        InputError: Even the last step leaves more.
    """

    def within(step: int) -> bool:
        return _spent(graph, budget, keeps_at(step), biases) <= budget.amount

    step = fewest(limit, within)
    if not within(step):
        raise _refusal(graph, budget, keeps_at(step), biases, further)
    return step


def steps_within(
    graph: Graph,
    budget: Budget,
    limit: int,
    keeps_at: Callable[[int], Keeps],
    biases: Callable[[Keeps], Collection[str]] = lambda _: (),
    further: Callable[[], str | None] = lambda: None,
) -> int:
    """Return the fewest steps as `steps_by_meter` does, and for a latency those at which the measured time is right.

    There each network found is timed. Where it misses the goal, what is asked of the model is corrected by the line
    through what was measured above and below, and searched again, a few times; the nearest is taken.

    Raises:
        InputError: Even the last step leaves more.
    """
    step = steps_by_meter(graph, budget, limit, keeps_at, biases, further)
    goal = budget.goal
    if goal is None:
        return step
    seen, found = [(goal.present, goal.present)], dict[int, float]()
    while True:
        predicted = _spent(graph, budget, keeps_at(step), biases)
        found[step] = goal.measure(keeps_at(step))
        seen.append((predicted, found[step]))
        if len(found) == TRIES or _miss(found[step], goal.amount) == 0:
            break
        asked = Budget(budget.kind, _asked(seen, _AIM * goal.amount), goal)
        step = fewest(limit, lambda k: _spent(graph, budget, keeps_at(k), biases) <= asked.amount)  # noqa: B023
        if step in found:  # what is asked lies between this step and the next one
            step += 1 if found[step] > goal.amount else -1
        if step in found or not 0 <= step <= limit:
            break
    if found.get(limit, 0.0) > (1 + CLOSE[1]) * goal.amount:
        raise _refusal(graph, budget, keeps_at(limit), biases, further, found[limit])
    return min(found, key=lambda k: _miss(found[k], goal.amount))


def _asked(seen: Sequence[tuple[float, float]], aim: float) -> float:
    """Return the prediction at which `aim` will be measured, by the `seen` pairs of predicted and measured."""
    above = min((pair for pair in seen if pair[1] >= aim), key=lambda pair: pair[1])
    below = max((pair for pair in seen if pair[1] < aim), key=lambda pair: pair[1], default=None)
    if below is None:
        return above[0] * aim / above[1]
    part = (aim - below[1]) / (above[1] - below[1])
    return below[0] + part * (above[0] - below[0])


def _miss(measured: float, goal: float) -> float:
    """Return how far outside of what is close a latency lies, as a share of the goal; 0 within."""
    share = measured / goal - 1
    return max(CLOSE[0] - share, share - CLOSE[1], 0.0)


def _spent(graph: Graph, budget: Budget, keeps: Keeps, biases: Callable[[Keeps], Collection[str]]) -> float:
    return budget.spent(graph, graph.kept_classes(keeps), biases(keeps))


def _refusal(
    graph: Graph,
    budget: Budget,
    keeps: Keeps,
    biases: Callable[[Keeps], Collection[str]],
    further: Callable[[], str | None],
    measured: float | None = None,
) -> InputError:
    """Return why a budget cannot be met: what the last step leaves, and for a latency the layers that take it."""
    goal = budget.goal
    if goal is None:
        left = _spent(graph, budget, keeps, biases)
        what = "MACs" if budget.kind == "macs" else "parameters"
        text = f"the target of {budget.amount:,.0f} {what} cannot be met"
        return InputError(f"{text}: removing all that may go leaves {left:,.0f}", hint=further())
    parts = goal.predict(graph, graph.kept_classes(keeps))
    longest = sorted(parts, key=lambda name: -parts[name])[:_NAMED]
    left = sum(parts.values()) if measured is None else measured
    named = ", ".join(f"{name} {parts[name]:.3g} ms" for name in longest)
    where = f" ({goal.conditions})" if goal.conditions else ""
    return InputError(
        f"a latency of {budget.amount:.3g} ms{where} cannot be met: removing all that may go leaves {left:.3g} ms, "
        f"most of it in {named}",
        hint="; ".join(filter(None, (f"ask for more than {left:.3g} ms", further()))),
    )
