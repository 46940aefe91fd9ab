"""`sweep`: the curve of accuracy against cost, point by point.

A point that is known already is not made again, so an interrupted sweep can be resumed, and a finished one refined.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from prunekit.data import Examples
from prunekit.errors import Interrupted, PrunekitError
from prunekit.evaluation.score import EvalResult
from prunekit.restoration.images import Images, LabelledImages
from prunekit.training.config import TrainConfig
from prunekit.training.events import Sink
from prunekit.workflows.sweeps.making import Material, make
from prunekit.workflows.sweeps.points import SweepPoint, Variant, check_axis, written

Measure = Callable[[nn.Module, str], EvalResult]


def sweep(
    model: nn.Module,
    variants: Sequence[Variant],
    budgets: Sequence[float | str],
    measure: Measure,
    *,
    axis: str = "ratio",
    seeds: Sequence[int] = (0,),
    images: Images | LabelledImages | None = None,
    train_set: Examples | None = None,
    val_set: Examples | None = None,
    calibration: int = 1000,
    tuning: TrainConfig | None = None,
    known: Sequence[SweepPoint] = (),
    on_point: Callable[[Sequence[SweepPoint]], None] | None = None,
    on_event: Sink | None = None,
) -> list[SweepPoint]:
    """Prune `model` with every variant to every budget with every seed, and measure the networks.

    Args:
        model: The network; it stays unchanged.
        variants: Methods with their settings; `manidp` for gates, trained for each budget anew.
        budgets: Where along the axis: ratios above 0 and below 1, or amounts such as `"50%"` or `"2M"`.
        measure: Called with a network and its name.
        axis: What the budgets are: `ratio` (share of channels to remove), `target_macs`, `target_params` or
            `target_latency` (to keep).
        seeds: Each makes all networks once: it seeds the method, the choice of calibration images, and the tuning.
        images: Images to restore from, the same for all seeds.
        train_set: Labelled images, or the examples that a task has opened, to tune on; without `images` those to
            restore from are drawn from them as well.
        val_set: Examples that decide which epoch of a tuning is kept.
        calibration: How many images are drawn to restore from.
        tuning: Settings of the tuning after each pruning, and of the training of gates; None for no tuning. What they
            leave open is chosen by the data and by what was cut.
        known: Points of an earlier run; those without figures are tried again.
        on_point: Called with all points after each new one.
        on_event: Called with the events of each tuning.

    Returns:
        The known points and a point for each variant, budget and seed; where a method refuses or fails, one with an
        `error`.

    Raises:
        InputError: An axis that there is not, or a budget that is none.
        Interrupted: A signal stopped a tuning.

    Examples:
        >>> import prunekit as pk
        >>> points = pk.sweep(pk.load("prunekit:vgg_digits"), [pk.Variant("slim")], ["50%", "25%"],
        ...                   lambda model, name: pk.evaluate(model, name=name), axis="target_macs")
        >>> [point.result.model for point in points]
        ['slim 50%', 'slim 25%']
    """
    check_axis(axis, tuple(budgets))
    material = Material(model, images, train_set, val_set, calibration, tuning, on_event)
    done = {point.key: point for point in known}
    for variant in variants:
        for budget in budgets:
            for seed in seeds:
                before = done.get((variant.label, written(budget), seed))
                if before is not None and before.result is not None:
                    continue
                point = _point(material, variant, axis, budget, seed, measure)
                done[point.key] = point
                if on_point:
                    on_point(list(done.values()))
    return list(done.values())


def _point(
    material: Material, variant: Variant, axis: str, budget: float | str, seed: int, measure: Measure
) -> SweepPoint:
    started, result, error, kept = time.perf_counter(), None, None, None
    try:
        made = make(material, variant, axis, budget, seed)
        result, kept = measure(made.model, f"{variant.label} {written(budget)}"), made.kept
    except Interrupted:
        raise
    except PrunekitError as refused:
        error = refused.message
    except Exception as failed:  # a fault of one method, perhaps of another package, does not cost the others
        error = f"{type(failed).__name__}: {failed}"
    seconds = time.perf_counter() - started
    place: dict[str, Any] = {"ratio": None, axis: budget}
    return SweepPoint(
        variant.label,
        variant.method,
        variant.settings,
        result=result,
        error=error,
        seconds=seconds,
        seed=seed,
        kept=kept,
        **place,
    )
