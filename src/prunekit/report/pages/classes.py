"""Accuracy and confusions of each class, as parts of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.pages import page
from prunekit.report.terminal.classes import class_cells
from prunekit.report.text import for_html

if TYPE_CHECKING:
    from prunekit.evaluation.answers import Answers
    from prunekit.evaluation.score import EvalResult

_MATRIX = 30  # a matrix of more classes is unreadable: the most frequent confusions are shown instead
_MISTAKES = 20


def class_parts(results: Sequence[EvalResult]) -> list[str]:
    """Return the parts of a page: accuracy by class, and the confusions of each network; none without images."""
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


def _confusions(model: str, answers: Answers) -> str:
    title = f"<h3>{for_html(model)}</h3>"
    if len(answers.classes) <= _MATRIX:
        return title + _matrix(answers)
    rows = [
        (answers.classes[label], answers.classes[named], f"{count:,}")
        for (label, named), count in list(answers.mistakes().items())[:_MISTAKES]
    ]
    return title + page.table(["class", "taken for", "images"], rows, left=2)


def _matrix(answers: Answers) -> str:
    """Return the confusion matrix, true classes by predicted ones; a cell is as dark as its share of the row."""
    names = answers.classes
    head = "".join(f'<th class="n" title="{for_html(name)}">{i}</th>' for i, name in enumerate(names))
    rows = []
    for i, counts in enumerate(answers.confusion().tolist()):
        cells = "".join(_cell(names[i], names[j], count, sum(counts), right=i == j) for j, count in enumerate(counts))
        label = names[i] if names[i] == str(i) else f"{i} {names[i]}"
        rows.append(f'<tr><td class="t">{for_html(label)}</td>{cells}</tr>')
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
    return f'<td class="n {kind}" style="--share:{share:.3f}" title="{for_html(note)}">{count:,}</td>'
