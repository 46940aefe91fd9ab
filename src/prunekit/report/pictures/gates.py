"""The charts of a gated network's report as PNG files. Needs the extra `pictures` (Matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.report.pages.gates import loss_chart, spread_chart, sweep_chart
from prunekit.report.pictures import png

if TYPE_CHECKING:
    from prunekit.methods.manidp.gate_report import Portrait


def draw_gates(portrait: Portrait, folder: Path) -> None:
    """`macs.png`, `sweep.png` and `difficulty.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    png.draw([spread_chart(portrait)], folder / "macs.png")
    png.draw([sweep_chart(portrait)], folder / "sweep.png")
    png.draw([loss_chart(portrait, most=None)], folder / "difficulty.png")
