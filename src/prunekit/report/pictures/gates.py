"""The charts of a gated network's report, for its page and as PNG files (these need the extra `pictures`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.methods.manidp.gate_report import histogram
from prunekit.report import numbers
from prunekit.report.pictures import png
from prunekit.report.pictures.chart import Axis, Chart, Point, ReferenceLine, Series

if TYPE_CHECKING:
    from prunekit.data import ImageSet
    from prunekit.methods.manidp.gate_report import Portrait

_DOTS = 400  # in the scatter plot
MACS = Axis("MACs of an image", written=numbers.count)


def spread_chart(portrait: Portrait) -> Chart:
    """Return a histogram of the cost of images."""
    points = tuple(Point(macs, n, note=numbers.counted(n, "image")) for macs, n in histogram(portrait.record.macs))
    mean = ReferenceLine(f"mean {numbers.count(portrait.result.macs['mean'])}", portrait.result.macs["mean"], "x")
    title = "Images by cost" + (f", budget {portrait.budget}" if portrait.budget else "")
    return Chart(title, MACS, Axis("images", written=numbers.count), (Series("", points, "bars"),), (mean,))


def sweep_chart(portrait: Portrait) -> Chart:
    """Return accuracy against mean MACs while all thresholds grow together, beside that before the gates."""
    points = tuple(
        Point(macs, 100 * accuracy, note=f"{numbers.count(macs)} MACs, {numbers.percent(accuracy)}")
        for macs, accuracy in sorted(portrait.sweep)
    )
    here = portrait.budget or "now"
    lines = [ReferenceLine(f"{here}: {numbers.count(portrait.result.macs['mean'])}", portrait.result.macs["mean"], "x")]
    if portrait.baseline is not None:
        share = numbers.percent(portrait.baseline)
        lines.append(ReferenceLine(f"before the gates {share} (validation)", 100 * portrait.baseline))
    across = Axis("mean MACs of an image", written=numbers.count)
    series = (Series("", points, "line"),)
    return Chart("Accuracy as thresholds sweep", across, Axis("accuracy", "%"), series, tuple(lines))


def loss_chart(portrait: Portrait, most: int | None = _DOTS) -> Chart:
    """Return the cost of images against their difficulty; `most` of them, evenly chosen."""
    record = portrait.record
    step = max(1, len(record.macs) // most) if most else 1
    points = tuple(
        Point(macs, loss)
        for macs, loss in zip(record.macs[::step].tolist(), record.losses[::step].tolist(), strict=True)
    )
    return Chart("Cost and difficulty", MACS, Axis("cross-entropy", "nats"), (Series("", points),))


def measured_with(portrait: Portrait, images: ImageSet) -> str:
    """Return the images and the thresholds that the figures come from."""
    budget = f"thresholds of the budget {portrait.budget}" if portrait.budget else "thresholds of no stored budget"
    return f"{numbers.counted(len(images), 'image')} of {images.name}, {budget}"


def draw_gates(portrait: Portrait, images: ImageSet, folder: Path) -> None:
    """Write `macs.png`, `sweep.png` and `difficulty.png` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    about = measured_with(portrait, images)
    png.draw([spread_chart(portrait)], folder / "macs.png", about=about)
    png.draw([sweep_chart(portrait)], folder / "sweep.png", about=about)
    png.draw([loss_chart(portrait, most=None)], folder / "difficulty.png", about=about)
