"""Accuracy of each class, and the class that it is mostly mistaken for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunekit.report import numbers
from prunekit.report.terminal.tables import table

if TYPE_CHECKING:
    from prunekit.evaluation.answers import Answers
    from prunekit.evaluation.score import EvalResult


def classes_table(results: Sequence[EvalResult]) -> Any:
    """Return a table with a row per class: its images and each network's accuracy; more for a single network."""
    return table(*class_cells(results))


def class_cells(results: Sequence[EvalResult]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return columns and rows of that table, as text."""
    scored = [(result.model, result.answers) for result in results if result.answers is not None]
    if len(scored) != 1:
        columns = ["class", "images", *(model for model, _ in scored)]
        rows = [
            (scores[0].name, f"{scores[0].images:,}", *(numbers.percent(score.accuracy) for score in scores))
            for scores in zip(*(answers.per_class for _, answers in scored), strict=True)
        ]
        return columns, rows
    answers = scored[0][1]
    taken = _taken_for(answers)
    columns = ["class", "images", "accuracy", "precision", "mostly taken for"]
    return columns, [
        (score.name, f"{score.images:,}", numbers.percent(score.accuracy), numbers.percent(score.precision), taken[i])
        for i, score in enumerate(answers.per_class)
    ]


def unbalanced(answers: Answers, accuracy: float | None) -> str | None:
    """Return a warning where one class dominates the data; None where none does."""
    if not answers.unbalanced:
        return None
    name, share = answers.largest
    return (
        f"{numbers.percent(share, decimals=0)} of the images are of one class, '{name}': naming it always would be as "
        f"accurate as that; this network has {numbers.percent(accuracy)}, and "
        f"{numbers.percent(answers.balanced_accuracy)} as the mean over the classes (see --per-class)"
    )


def _taken_for(answers: Answers) -> list[str]:
    """Return for each class the one that it is most often mistaken for, and how often."""
    found = [numbers.NONE] * len(answers.classes)
    for (label, named), count in answers.mistakes().items():  # most frequent first
        if found[label] == numbers.NONE:
            found[label] = f"{answers.classes[named]} ({count:,})"
    return found
