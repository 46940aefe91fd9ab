"""Two networks on the same examples: what the second has lost of the score, whatever the task."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import nn

from prunekit.data import Examples, ImageSet
from prunekit.errors import InputError
from prunekit.evaluation import answers
from prunekit.evaluation.paired import Drop, ScoreDrop
from prunekit.evaluation.score import EvalResult, evaluate, evaluating, scored
from prunekit.metric import Metric

PARTS = 20
"""Parts of the examples that are scored by themselves, where answers are not just right or wrong."""

LEAST_PARTS = 8


@dataclass(frozen=True)
class Measured:
    """The figures of a network on examples, and its scores on parts of them; none where its answers are known."""

    result: EvalResult
    parts: tuple[float, ...] = ()


def measured(model: nn.Module, examples: Examples, name: str) -> Measured:
    """Return what `drop_between` compares; each example is scored once more in its part, where that takes parts.

    Raises:
        InputError: The examples do not fit the network, or are too few for parts.
    """
    result = evaluate(model, examples, name=name)
    if isinstance(examples, ImageSet):
        return Measured(result)
    check_parts(len(examples), examples.noun)
    count = min(PARTS, len(examples))
    parts = (examples.subset(torch.arange(start, len(examples), count)) for start in range(count))
    with evaluating(model):
        return Measured(result, tuple(scored(model, part).value for part in parts))


def check_parts(count: int, noun: str) -> None:
    """Raise `InputError` where so many examples are too few to tell how sure a loss is."""
    if count < LEAST_PARTS:
        raise InputError(f"{count} held-out {noun}s are too few to compare networks by", hint=f"{LEAST_PARTS} at least")


def drop_between(before: Measured, after: Measured) -> Drop | ScoreDrop:
    """Return what a network has lost against the original, both measured on the same examples.

    Raises:
        InputError: They were measured on others.
    """
    if before.result.answers is not None and after.result.answers is not None:
        return answers.drop_between(before.result.answers, after.result.answers)
    metric, whole = before.result.metric, before.result.score
    assert metric is not None
    assert whole is not None
    assert after.result.score is not None
    scale = scale_of(metric, whole)
    lost = [metric.lost(was, now) / scale for was, now in zip(before.parts, after.parts, strict=True)]
    error = statistics.stdev(lost) / len(lost) ** 0.5
    return ScoreDrop(before.result.images, len(lost), metric.lost(whole, after.result.score) / scale, error)


def scale_of(metric: Metric, before: float) -> float:
    """Return what a drop counts in: points of a share, or else the original's score.

    Raises:
        InputError: That is zero.
    """
    if metric.is_share:
        return 1.0
    if not before:
        raise InputError(f"the original's {metric.name} is 0, of which nothing can be lost in percent")
    return abs(before)


def left_after(metric: Metric, before: float, share: float) -> float:
    """Return the score that is left after a drop of `share`."""
    return before - (1 if metric.higher_is_better else -1) * share * scale_of(metric, before)
