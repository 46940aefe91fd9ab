"""The gates of a network on a data set, as one self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from prunekit.report import numbers
from prunekit.report.pages import page
from prunekit.report.pictures import svg
from prunekit.report.pictures.gates import loss_chart, measured_with, spread_chart, sweep_chart
from prunekit.report.text import for_html

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.data import ImageSet
    from prunekit.methods.manidp.gate_report import Portrait

_SHOWN = 12  # images at each end
_SIDE = 96  # pixels of a thumbnail


def gates_page(model: str, portrait: Portrait, images: ImageSet) -> str:
    """Return the page; every picture is embedded in it."""
    result = portrait.result
    facts = [
        ("accuracy", numbers.percent(portrait.record.accuracy)),
        (f"mean MACs, {numbers.change(result.dense, result.macs['mean'])}", numbers.count(result.macs["mean"])),
        ("with the gates", numbers.count(result.with_gates["mean"])),
        ("median", numbers.count(result.macs["median"])),
        ("5 % to 95 % of the images", f"{numbers.count(result.macs['p5'])} to {numbers.count(result.macs['p95'])}"),
        ("Spearman of MACs and loss", f"{result.spearman or 0:.3f}"),
    ]
    parts = [
        page.paragraph(f"{measured_with(portrait, images)}; dense, the network costs {result.dense:,} MACs."),
        page.cards(facts),
        page.charts([svg.draw(chart(portrait)) for chart in (spread_chart, sweep_chart, loss_chart)]),
        page.heading("The cheapest images"),
        _gallery(portrait, images, portrait.cheapest(_SHOWN)),
        page.heading("The dearest images"),
        _gallery(portrait, images, portrait.dearest(_SHOWN)),
        page.heading("Classes"),
        _classes(portrait),
        page.heading("Layers"),
        _layers(portrait),
    ]
    return page.page(f"Gates of {model}", parts)


def _gallery(portrait: Portrait, images: ImageSet, places: Sequence[int]) -> str:
    import torch

    chosen = images.subset(places)
    pixels = chosen.images if isinstance(chosen.images, torch.Tensor) else chosen.images[torch.arange(len(places))]
    figures = []
    for place, picture, label in zip(places, pixels, chosen.labels.tolist(), strict=True):
        text = f"{images.classes[label]}, {numbers.count(float(portrait.record.macs[place]))}"
        figures.append(
            f'<div class="card"><img width="{_SIDE}" height="{_SIDE}" alt="{for_html(text)}" '
            f'src="data:image/png;base64,{_png(picture)}"><span>{for_html(text)}</span></div>'
        )
    return f'<div class="cards">{"".join(figures)}</div>'


def _png(picture: Tensor) -> str:
    """Return one image `(C, H, W)` of uint8 as PNG in base 64; the first one or three channels are shown."""
    channels = picture[:3] if picture.size(0) >= 3 else picture[:1]
    array = channels.permute(1, 2, 0).cpu().numpy()
    stream = io.BytesIO()
    Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _classes(portrait: Portrait) -> str:
    most = max(macs for macs, _ in portrait.classes.values())
    rows = [
        (name, page.bar(numbers.count(macs), macs / most, 1.0), numbers.percent(accuracy))
        for name, (macs, accuracy) in sorted(portrait.classes.items(), key=lambda item: item[1][0])
    ]
    return page.table(["class", "mean MACs", "accuracy"], rows, raw=(1,))


def _layers(portrait: Portrait) -> str:
    rows = [
        (
            layer.layer,
            page.bar(numbers.percent(layer.kept, decimals=1), 1.0, layer.kept),
            str(layer.channels),
            str(layer.always),
            str(layer.never),
            f"{portrait.alignment[layer.layer]:.3f}",
        )
        for layer in portrait.result.layers
    ]
    columns = ["gated layer", "kept", "channels", "always on", "never on", "alignment of manifolds"]
    return page.table(columns, rows, raw=(1,))
