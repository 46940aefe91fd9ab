"""The result of a surgery, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group

from prunekit.report import numbers
from prunekit.report.terminal.inspection import TITLES, some
from prunekit.report.terminal.output import Output
from prunekit.report.terminal.tables import table

if TYPE_CHECKING:
    from prunekit.api import Pruned


# What a note of a plan is called; others by their key, without underscores.
_WORDS = {
    "widths": "widths of the layers",
    "merged": "filters merged into others",
    "negative_scales": "of these with a negative scale",
    "left": "layers left as they were",
    "blocks": "residual blocks that go as a whole",
    "plain": "only cut, nothing merged",
    "protected": "layers kept from being emptied",
    "threshold": "threshold of gamma",
    "constants_lost": "layers that cannot take over constants",
    "refit_bn": "batch norms measured anew",
    "calibration": "restored from images",
    "synthetic": "restored from synthetic images",
    "few": "restored from few images, in views and among made ones",
    "restore": "restoration",
    "plain_weights": "weights that are computed no more",
}


def report(output: Output, pruned: Pruned, *, dry_run: bool) -> None:
    """Show the figures before and after, and remarks; with `dry_run` also the plan, as the data asked for."""
    parts: list[Any] = [_change(pruned)]
    if dry_run:
        parts.insert(0, _widths(pruned))
    output.table(Group(*parts), data=dry_run)
    for line in _remarks(pruned):
        output.note(line)


def _change(pruned: Pruned) -> Any:
    before, after = pruned.before.to_json(), pruned.after.to_json()
    rows = [
        (title, f"{before[key]:,}", f"{after[key]:,}", numbers.change(before[key], after[key]))
        for key, title in TITLES.items()
    ]
    timed = pruned.plan.notes.get("latency")
    if timed:
        times = (numbers.milliseconds(timed["before"]), numbers.milliseconds(timed["after"]))
        rows.append(("latency", *times, numbers.change(timed["before"], timed["after"])))
    return table(["", "before", "after", "change"], rows)


def _widths(pruned: Pruned) -> Any:
    """Return the plan as a table: how many channels each group keeps."""
    kept = {pruned.graph.group(keep.group).name: len(keep.index) for keep in pruned.plan.keeps}
    rows = [
        (group.name, str(group.size), str(kept.get(group.name, group.size)))
        for group in pruned.graph.groups
        if group.free
    ]
    return table(["channel group", "channels", "kept"], rows)


def _remarks(pruned: Pruned) -> Sequence[str]:
    """Return the notes of the method, the proof, and the time."""
    said = {key: value for key, value in pruned.plan.notes.items() if key != "never_ran"}  # already shown as a warning
    notes = _worth_saying(said).items()
    lines = [f"{_words(key)}: {_latency(value) if key == 'latency' else _short(value)}" for key, value in notes]
    proof = f"masked and sliced agree to {pruned.difference:.1e}"
    seconds = f"{numbers.duration(pruned.seconds)}, verified in {numbers.duration(pruned.verify_seconds)}"
    return [*lines, f"{proof}; pruned in {seconds}"]


def _latency(timed: Mapping[str, Any]) -> str:
    """Return what was asked for, and what the figures hold for."""
    goal, predicted = numbers.milliseconds(timed["goal"]), numbers.milliseconds(timed["predicted"])
    threads = numbers.counted(timed["threads"], "thread")
    clock = ", CPU time" if timed["clock"] == "cpu" else ""
    where = f"{timed['runtime']} {timed['version']}, batch {timed['batch']}, {threads}{clock}"
    return f"asked for {goal}, predicted {predicted}; {where}, {timed['machine']}"


def _worth_saying(notes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in notes.items() if value not in (None, [], {}, "", 0)}


def _words(key: str) -> str:
    return _WORDS.get(key, key.replace("_", " "))


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return some([str(item) for item in value])
    if isinstance(value, dict):
        return some([_entry(str(key), item) for key, item in _worth_saying(value).items()])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _entry(key: str, value: Any) -> str:
    """Return a layer with the reason that is noted for it, or a figure or a list after its name."""
    if isinstance(value, str):
        return f"{key} ({value})"
    return f"{_words(key)}{':' if isinstance(value, dict) else ''} {_short(value)}"
