"""How well each class is recognised, and what it is taken for: a table for the terminal, and for a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from prunekit.report import numbers
from prunekit.report.pages import page
from prunekit.report.terminal.tables import table

if TYPE_CHECKING:
    from prunekit.evaluation.answers import Answers
    from prunekit.evaluation.score import EvalResult

_MATRIX = 30  # a matrix of more classes cannot be read: the most frequent mistakes can
_MISTAKES = 20


def classes_table(results: Sequence[EvalResult]) -> Any:
    """A row a class: its images and each network's accuracy; of a single network more."""
    return table(*class_cells(results))


def class_cells(results: Sequence[EvalResult]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns and rows of that table, as text."""
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
    """What to beware of where one class is most of the data; None where none is."""
    if not answers.unbalanced:
        return None
    name, share = answers.largest
    return (
        f"{numbers.percent(share, decimals=0)} of the images are of one class, '{name}': naming it always would be as "
        f"accurate as that; this network has {numbers.percent(accuracy)}, and "
        f"{numbers.percent(answers.balanced_accuracy)} as the mean over the classes (see --per-class)"
    )


def class_parts(results: Sequence[EvalResult]) -> list[str]:
    """The pieces of a page: accuracy by class, and the confusions of each network; none without images."""
    scored = [(result.model, result.answers) for result in results if result.answers is not None]
    if not scored:
        return []
    columns, rows = class_cells(results)
    left = [answers.largest for _, answers in scored if answers.unbalanced][:1]
    beware = [
        page.paragraph(
            f"{numbers.percent(share, decimals=0)} of the images are of one class, {name}: look at each class, "
            "and at the mean over them (balanced), rather than at plain accuracy."
        )
        for name, share in left
    ]
    confusions = [_confusions(model, answers) for model, answers in scored]
    parts = [page.heading("Classes"), *beware, page.table(columns, rows)]
    key = "A row has the images of a class, by what the network named them."
    if len(scored[0][1].classes) > _MATRIX:
        key = f"The {_MISTAKES} most frequent mistakes."
    return [*parts, page.heading("Taken for"), page.paragraph(key), page.charts(confusions)]


def _taken_for(answers: Answers) -> list[str]:
    """For each class the one that it is most often taken for, and how often."""
    found = [numbers.NONE] * len(answers.classes)
    for (label, named), count in answers.mistakes().items():  # most frequent first
        if found[label] == numbers.NONE:
            found[label] = f"{answers.classes[named]} ({count:,})"
    return found


def _confusions(model: str, answers: Answers) -> str:
    title = f"<h3>{escape(model)}</h3>"
    if len(answers.classes) <= _MATRIX:
        return title + _matrix(answers)
    rows = [
        (answers.classes[label], answers.classes[named], f"{count:,}")
        for (label, named), count in list(answers.mistakes().items())[:_MISTAKES]
    ]
    return title + page.table(["class", "taken for", "images"], rows, left=2)


def _matrix(answers: Answers) -> str:
    """Rows are the classes, columns what they were named; a cell is as dark as its share of the row."""
    names = answers.classes
    head = "".join(f'<th class="n" title="{escape(name, quote=True)}">{i}</th>' for i, name in enumerate(names))
    rows = []
    for i, counts in enumerate(answers.confusion().tolist()):
        cells = "".join(_cell(names[i], names[j], count, sum(counts), right=i == j) for j, count in enumerate(counts))
        label = names[i] if names[i] == str(i) else f"{i} {names[i]}"
        rows.append(f'<tr><td class="t">{escape(label)}</td>{cells}</tr>')
    return (
        f'<div class="wide"><table class="heat"><thead><tr><th class="t">class</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(name: str, named: str, count: int, of: int, *, right: bool) -> str:
    if not count:
        return '<td class="n"></td>'
    share = count / of
    note = f"{name}, named {named}: {count:,} of {of:,} ({numbers.percent(share, decimals=1)})"
    kind = "right" if right else "wrong"
    return f'<td class="n {kind}" style="--share:{share:.3f}" title="{escape(note, quote=True)}">{count:,}</td>'
