"""Pictures of a pruning: gammas, widths, accuracy against cost. Needs the extra `pictures` (Matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.checkpoint import atomic_write
from prunekit.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from prunekit.passes import PassResult

Panel = tuple[str, Sequence[tuple[str, Sequence[tuple[float, float, str]]]]]
"""The label of the x axis, and lines of points (x, y, what is written beside)."""

_PICTURES = (".png", ".svg", ".pdf")
_BEFORE, _AFTER = "#9aa5b1", "#2563eb"


def require_matplotlib() -> Any:
    """Matplotlib's object-oriented `Figure`, which needs no display.

    Raises:
        InputError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need Matplotlib", hint="pip install 'prunekit[pictures]'") from error
    return Figure


def check_picture(path: str) -> None:
    """Raise `InputError` where Matplotlib is missing or cannot write such a file."""
    require_matplotlib()
    suffix = Path(path).suffix.lower()
    if suffix not in _PICTURES:
        raise InputError(f"{Path(path).name} has the suffix '{suffix}'", hint=f"pictures are {', '.join(_PICTURES)}")


def gammas_of(model: nn.Module) -> torch.Tensor:
    """|gamma| of every batch norm, `(channels,)`."""
    scales = [m.weight.detach().abs().flatten() for m in model.modules() if isinstance(m, _BatchNorm) and m.affine]
    return torch.cat(scales).cpu() if scales else torch.zeros(0)


def draw_gammas(before: torch.Tensor, after: torch.Tensor, threshold: float | None, path: Path) -> None:
    """Histograms of |gamma| before and after, with the threshold between what went and what stayed."""
    axes = new_chart(xlabel="|gamma|", ylabel="channels", title="Batch-norm scales")
    top = float(max([t.max() for t in (before, after) if t.numel()], default=torch.tensor(1.0)))
    bins = torch.linspace(0, top or 1.0, 61).tolist()
    axes.hist(before.tolist(), bins=bins, color=_BEFORE, label="before")
    axes.hist(after.tolist(), bins=bins, color=_AFTER, label="after", histtype="step", linewidth=1.6)
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.3g}")
    write_chart(axes, path)


def draw_widths(before: Mapping[str, int], after: Mapping[str, int], path: Path) -> None:
    """Output channels of each layer before and after, in execution order."""
    axes = new_chart(xlabel="", ylabel="channels", title="Widths", width=max(6.0, 0.22 * len(before)))
    places = range(len(before))
    axes.bar(places, list(before.values()), color=_BEFORE, label="before")
    axes.bar(places, [after.get(name, 0) for name in before], color=_AFTER, label="after", width=0.5)
    axes.set_xticks(list(places), list(before), rotation=90, fontsize=6)
    write_chart(axes, path)


def draw_passes(passes: Sequence[PassResult], start_accuracy: float, path: Path) -> None:
    """Accuracy against MACs over the passes, right after pruning and after tuning."""
    axes = new_chart(xlabel="MACs (millions)", ylabel="accuracy (%)", title="Accuracy over the passes")
    macs = [passes[0].before.macs / 1e6, *(p.after.macs / 1e6 for p in passes)]
    axes.plot(
        macs, [100 * start_accuracy, *(100 * p.accuracy_tuned for p in passes)], "o-", color=_AFTER, label="tuned"
    )
    axes.plot(macs[1:], [100 * p.accuracy_pruned for p in passes], "x", color=_BEFORE, label="right after pruning")
    axes.invert_xaxis()
    write_chart(axes, path)


def draw_tradeoffs(title: str, panels: Sequence[Panel], path: Path, *, force: bool = False) -> None:
    """Accuracy (%) against one figure a panel. A line is `(name, points)`, a point `(x, y, note)`."""
    figure = require_matplotlib()(figsize=(6.0 * len(panels), 4.2), layout="constrained")
    if title:
        figure.suptitle(title)
    for axes, (xlabel, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(xlabel=xlabel, ylabel="accuracy (%)")
        axes.spines[["top", "right"]].set_visible(False)
        for name, points in lines:
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-" if name else "o", label=name or None)
        _annotate(axes, [point for _, points in lines for point in points])
        if any(name for name, _ in lines):
            axes.legend(frameon=False)
    kind = path.suffix.lower().removeprefix(".")
    atomic_write(path, lambda stream: figure.savefig(stream, dpi=120, format=kind), force=force)


def _annotate(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each point's note beside it: above one another where points lie together, leftwards at the right end."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for x, y, note in sorted(points, key=lambda point: point[1]):
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        while any(abs(across - a) < 0.2 and abs(up - b) < 0.04 for a, b in taken):
            up += 0.04
        taken.append((across, up))
        side = "right" if across > 0.75 else "left"
        place = (x + (right - left) * (-0.015 if side == "right" else 0.015), low + up * (high - low))
        axes.annotate(note, place, fontsize=8, ha=side, va="center")


def new_chart(*, xlabel: str, ylabel: str, title: str, width: float = 6.0) -> Axes:
    """An empty chart."""
    figure = require_matplotlib()(figsize=(min(width, 40.0), 4.0), layout="constrained")
    axes: Axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def write_chart(axes: Axes, path: Path) -> None:
    """Write a chart as PNG, making its folder; a legend where something has a name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=120)
