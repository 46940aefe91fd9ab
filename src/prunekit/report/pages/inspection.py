"""The result of `inspect` as a page: widths before and after, channel groups, frozen groups with reasons, history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunekit.metric import Metric
from prunekit.report import numbers
from prunekit.report.pages import page
from prunekit.report.terminal.inspection import TITLES, describe_step, some


def inspection_page(facts: Mapping[str, Any]) -> str:
    """Return the document of `inspect` as one self-contained page."""
    spec, original = facts["input"], facts["original"]
    about = [
        facts["arch"] or "unknown architecture",
        "x".join(map(str, spec["shape"])) if spec else "",
        numbers.data_size(facts["bytes"]),
    ]
    parts = [
        page.paragraph(", ".join(part for part in about if part and part != numbers.NONE)),
        page.cards([_card(key, title, facts, original) for key, title in TITLES.items()]),
        page.heading("Layers"),
        _layers(facts["layers"], original["widths"] if original else {}),
        page.heading("Channel groups"),
        _groups(facts["groups"]),
    ]
    if facts["sensitivity"]:
        parts += [page.heading("Sensitivity"), *_sensitivity(facts["sensitivity"])]
    if facts["history"]:
        rows = [(str(number), describe_step(step)) for number, step in enumerate(facts["history"], start=1)]
        parts += [page.heading("History"), page.table(["", "what was done"], rows, left=2)]
    return page.page(str(facts["model"]), parts)


def _card(key: str, title: str, facts: Mapping[str, Any], original: Mapping[str, Any] | None) -> tuple[str, str]:
    figure = numbers.count(facts[key])
    if original is None:
        return title, figure
    return f"{title}: {numbers.change(original[key], facts[key])} of {numbers.count(original[key])}", figure


def _layers(layers: Sequence[Mapping[str, Any]], widths: Mapping[str, int]) -> str:
    """Return a table of convolutions and linear layers with bars of their widths; all other layers are folded."""
    widest = max([*(layer["channels"] for layer in layers), *widths.values(), 1])
    wide = [layer for layer in layers if layer["channels"]]
    rows = [
        (
            layer["name"],
            layer["kind"],
            _width(layer["channels"], widths.get(layer["name"], layer["channels"]), widest),
            f"{layer['params']:,}",
            f"{layer['macs']:,}",
        )
        for layer in wide
    ]
    shown = page.table(["layer", "kind", "channels", "parameters", "MACs"], rows, left=2, raw=(2,))
    others = [(layer["name"], layer["kind"], f"{layer['params']:,}") for layer in layers if not layer["channels"]]
    if others:
        shown += page.folded(
            numbers.counted(len(others), "other layer"), page.table(["layer", "kind", "parameters"], others, left=2)
        )
    return shown


def _width(now: int, before: int, widest: int) -> str:
    """Return a width and its bar: the whole bar is the width before pruning, its bright part the present one."""
    text = f"{now} of {before}" if now != before else str(now)
    return page.bar(text, before / widest, now / max(before, now))


def _groups(groups: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            group["name"],
            some(group["producers"]),
            some(group["consumers"]),
            "; ".join(f"{count} frozen: {reason}" for reason, count in group["frozen"].items()),
            str(group["channels"]),
            str(group["removable"]),
        )
        for group in groups
    ]
    return page.table(["group", "made by", "read by", "why not", "channels", "removable"], rows, left=4)


_RESTORED = (
    "prunes one group alone, and refits what reads it to training images. Lost is the error of the network's outputs, "
    "as a share of their variance."
)


def _sensitivity(found: Mapping[str, Any]) -> list[str]:
    """Return a row per group: the score left when it alone loses channels, with a bar for the largest loss."""
    groups, whole, metric = found["groups"], found["score"], Metric.from_json(found["metric"])
    ratios, restored = groups[0]["ratios"], groups[0]["loss"] is not None
    rows = []
    for group in groups:
        left = min(group["score"], key=metric.goodness)
        bar = page.bar(numbers.score(metric, left), 1.0, _share_left(metric, whole, left))
        figures = [numbers.score(metric, a) for a in group["score"]]
        figures += [f"{100 * lost:.2g} %" for lost in group["loss"] or ()]
        rows.append((group["group"], bar, str(group["channels"]), *figures))
    images = numbers.counted(found["images"], found["noun"])
    text = f"{metric.title} {numbers.score(metric, whole)} on {images} with all channels. Each row " + (
        _RESTORED if restored else "prunes one group alone, smallest filters first, and restores nothing."
    )
    lost = [f"lost −{ratio:.0%}" for ratio in ratios if restored]
    columns = ["group", "least left", "channels", *(f"−{ratio:.0%}" for ratio in ratios), *lost]
    return [page.paragraph(text), page.table(columns, rows, raw=(1,))]


def _share_left(metric: Metric, whole: float, left: float) -> float:
    """Return how much of a score is left, 0 to 1; for one where less is better, by how many times it has grown."""
    better, worse = max(abs(whole), abs(left), 1e-9), min(abs(whole), abs(left))
    return worse / better if metric.beats(whole, left) else 1.0
