"""The result of `inspect`, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from prunekit.metric import ACCURACY, Metric
from prunekit.report import numbers
from prunekit.report.terminal.tables import table
from prunekit.report.text import printable

_NAMES_SHOWN = 3
TITLES = {"params": "parameters", "macs": "MACs", "channels": "channels"}


def inspection(facts: Mapping[str, Any]) -> Group:
    """Return the document of `inspect` as text and tables, the summary first."""
    widths = facts["original"]["widths"] if facts["original"] else {}
    parts: list[Any] = [_summary(facts), _layers(facts["layers"], widths), _groups(facts["groups"])]
    if facts["frozen"]:
        parts.append(_frozen(facts["frozen"]))
    if facts["sensitivity"]:
        parts.append(_sensitivity(facts["sensitivity"]))
    if facts["history"]:
        parts.append(_history(facts["history"]))
    return Group(*parts)


def _summary(facts: Mapping[str, Any]) -> Text:
    arguments = ", ".join(f"{key}={value}" for key, value in facts["arch_args"].items())
    lines = [
        ("model", facts["model"]),
        ("architecture", (facts["arch"] or "unknown") + (f" ({arguments})" if arguments else "")),
        ("input", _input(facts["input"])),
        ("classes", some(facts["classes"])),
        ("size", numbers.data_size(facts["bytes"])),
        *((title, _figure(facts, key)) for key, title in TITLES.items()),
    ]
    known = [(name, value) for name, value in lines if value not in ("", numbers.NONE)]
    return Text("\n".join(f"{name:<13} {printable(value)}" for name, value in known))


def _figure(facts: Mapping[str, Any], key: str) -> str:
    """Return a figure, with that of the unpruned architecture where it is known."""
    original = facts["original"]
    return f"{facts[key]:,}" + (f" of {original[key]:,}" if original else "")


def _input(spec: Mapping[str, Any] | None) -> str:
    if spec is None:
        return ""
    shape = "x".join(map(str, spec["shape"]))
    if not spec["mean"]:
        return shape
    return f"{shape}, mean {_figures(spec['mean'])}, std {_figures(spec['std'])}"


def _layers(layers: Sequence[Mapping[str, Any]], widths: Mapping[str, int]) -> Any:
    """Return a table of layers; `widths` are the channels before pruning, where known."""
    rows = [
        (
            layer["name"],
            layer["kind"],
            _width(layer["channels"], widths.get(layer["name"])),
            f"{layer['params']:,}",
            f"{layer['macs']:,}",
        )
        for layer in layers
    ]
    return table(["layer", "kind", "channels", "parameters", "MACs"], rows, left=2, title="\nLayers")


def _width(now: int, before: int | None) -> str:
    if not now:
        return numbers.NONE
    return f"{now} of {before}" if before not in (None, now) else str(now)


def _sensitivity(found: Mapping[str, Any]) -> Any:
    """Return a table of the score left when one group alone loses channels, and of what the outputs lose."""
    groups, metric = found["groups"], Metric.from_json(found["metric"])
    ratios = [f"−{ratio:.0%}" for ratio in groups[0]["ratios"]]
    restored = groups[0]["loss"] is not None
    rows = [
        (
            group["group"],
            str(group["channels"]),
            *(numbers.score(metric, left) for left in group["score"]),
            *(f"{100 * lost:.2g} %" for lost in group["loss"] or ()),
        )
        for group in groups
    ]
    columns = [
        "pruned alone" + ", restored" * restored,
        "channels",
        *ratios,
        *(f"lost {one}" for one in ratios * restored),
    ]
    of = "" if metric == ACCURACY else f"{metric.name} "
    images = numbers.counted(found["images"], found["noun"])
    whole = f"{of}{numbers.score(metric, found['score'])} on {images} with all channels"
    said = "; lost: error of the outputs, of their variance" * restored
    return table(columns, rows, title=f"\nSensitivity: {whole}{said}")


def _groups(groups: Sequence[Mapping[str, Any]]) -> Any:
    rows = [
        (
            group["name"],
            some(group["producers"]),
            some(group["consumers"]),
            str(group["channels"]),
            str(group["removable"]),
        )
        for group in groups
    ]
    columns = ["group", "made by", "read by", "channels", "removable"]
    return table(columns, rows, left=3, title="\nChannel groups")


def _frozen(frozen: Mapping[str, Sequence[str]]) -> Any:
    rows = [(reason, some(groups)) for reason, groups in frozen.items()]
    return table(["why not", "groups"], rows, left=2, title="\nFrozen channels")


def _history(history: Sequence[Mapping[str, Any]]) -> Any:
    rows = [(str(number), describe_step(step)) for number, step in enumerate(history, start=1)]
    return table(["step", "what was done"], rows, left=2, title="\nHistory")


def describe_step(step: Mapping[str, Any]) -> str:
    """Describe one step of history: settings other than the defaults, and results. The plan is left to `--json`."""
    name = str(step.get("method", "plan"))
    usual = _usual_settings(name)
    chosen = {key: value for key, value in step.get("settings", {}).items() if key not in usual or usual[key] != value}
    parts = [name, *(f"{key}={_plain(value)}" for key, value in chosen.items())]
    if step.get("before") and step.get("after"):
        before, after = step["before"], step["after"]
        parts += [f"{TITLES[key]} {before[key]:,} to {after[key]:,}" for key in TITLES if key in before]
    if step.get("score") is not None:
        metric = Metric.from_json(step["metric"])
        parts.append(f"validation {metric.name} {numbers.score(metric, step['score'])}")
    elif step.get("accuracy") is not None:  # of an earlier release
        parts.append(f"validation accuracy {numbers.percent(step['accuracy'])}")
    return ", ".join(parts)


def _plain(value: Any) -> str:
    """Format a setting for people: a computed rate has more digits than anybody reads."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={_plain(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _usual_settings(name: str) -> dict[str, Any]:
    """Return the default settings of a step; for a method that is not installed, those that every method has."""
    from prunekit.methods import registry
    from prunekit.methods.base import Config
    from prunekit.training.config import TrainConfig

    if name == "train":
        return TrainConfig().settings()
    return (registry.get(name).Config if name in registry.names() else Config)().to_json()


def some(names: Sequence[str]) -> str:
    """Return the first few names, and the number of the others."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


def _figures(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
