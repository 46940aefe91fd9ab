"""The charts of a gated network's report as PNG files. Needs the extra `pictures` (Matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.report.pictures import new_chart, write_chart

if TYPE_CHECKING:
    from prunekit.methods.manidp.portrait import Portrait

_COLOUR = "#2563eb"


def draw_gates(portrait: Portrait, folder: Path) -> None:
    """`macs.png`, `sweep.png` and `difficulty.png` in `folder`."""
    macs = (portrait.record.macs / 1e6).tolist()
    spread = new_chart(xlabel="MACs of an image (millions)", ylabel="images", title="Images by cost")
    spread.hist(macs, bins=40, color=_COLOUR)
    write_chart(spread, folder / "macs.png")
    sweep = new_chart(xlabel="mean MACs (millions)", ylabel="accuracy (%)", title="Accuracy as thresholds sweep")
    points = sorted(portrait.sweep)
    sweep.plot([m / 1e6 for m, _ in points], [100 * a for _, a in points], "o-", color=_COLOUR)
    write_chart(sweep, folder / "sweep.png")
    hard = new_chart(xlabel="MACs of an image (millions)", ylabel="cross-entropy (nats)", title="Cost and difficulty")
    hard.plot(macs, portrait.record.losses.tolist(), ".", color=_COLOUR, markersize=2, alpha=0.4)
    write_chart(hard, folder / "difficulty.png")
