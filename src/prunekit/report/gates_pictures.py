"""The charts of a gated network's report as PNG files. Needs the extra `pictures` (Matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.report import pictures
from prunekit.report.gates_page import loss_chart, spread_chart, sweep_chart

if TYPE_CHECKING:
    from prunekit.methods.manidp.portrait import Portrait


def draw_gates(portrait: Portrait, folder: Path) -> None:
    """`macs.png`, `sweep.png` and `difficulty.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures.draw([spread_chart(portrait)], folder / "macs.png")
    pictures.draw([sweep_chart(portrait)], folder / "sweep.png")
    pictures.draw([loss_chart(portrait, most=None)], folder / "difficulty.png")
