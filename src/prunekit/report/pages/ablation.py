"""What the losses of ManiDP are worth, as one page and as the cells of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit.report import numbers
from prunekit.report.pages import page

if TYPE_CHECKING:
    from prunekit.methods.manidp.variants import AblationRow

TITLE = "Ablation of the gates of"
_MEANINGS = {
    "dense": "the network without gates",
    "both": "trained with both losses",
    "complexity": "with the complexity loss alone",
    "similarity": "with the similarity loss alone",
    "neither": "with neither loss",
    "dynamic control": "neither loss; each layer keeps equally many channels for every image",
    "static control": "pruned by L1 norm, restored and tuned as long",
}


def ablation_cells(rows: Sequence[AblationRow]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return columns and rows as text."""
    cells: list[tuple[str, ...]] = [
        (
            row.label,
            numbers.percent(row.accuracy),
            numbers.count(row.macs),
            _span(row),
            numbers.NONE if row.spearman is None else f"{row.spearman:.3f}",
        )
        for row in rows
    ]
    return ["losses", "accuracy", "mean MACs", "5 % to 95 % of the images", "Spearman of MACs and loss"], cells


def ablation_page(model: str, about: str, rows: Sequence[AblationRow]) -> str:
    """Return one page: the table, with the meaning of each row."""
    columns, cells = ablation_cells(rows)
    explained = [(label, _MEANINGS[label], *figures) for label, *figures in cells]
    errors = [page.paragraph(f"{row.label}: {row.error}") for row in rows if row.error is not None]
    table = page.table([columns[0], "", *columns[1:]], explained, left=2)
    return page.page(f"{TITLE} {model}", [page.paragraph(about), table, *errors])


def _span(row: AblationRow) -> str:
    if row.macs_p5_p95 is None:
        return numbers.NONE
    low, high = row.macs_p5_p95
    return f"{numbers.count(low)} to {numbers.count(high)}"
