"""The figures of a gated network, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from prunekit.report import numbers
from prunekit.report.terminal.tables import table
from prunekit.report.text import printable


def gates_table(model: str, facts: Mapping[str, Any]) -> Any:
    """Return a table of a gated network: costs over the images, its runtimes, and its layers."""
    parts: list[Any] = [Text(f"gates of {printable(model)}", style="bold"), _costs(facts)]
    if "runtimes_ms" in facts:
        parts.append(_runtimes(facts["runtimes_ms"]))
    if "layers" in facts:
        parts.append(_layers(facts))
    return Group(*parts)


def _costs(facts: Mapping[str, Any]) -> Any:
    dense = facts["dense_macs"]
    rows = [("dense, without gates", numbers.count(dense), "")]
    for name, value in facts.get("macs", {}).items():
        rows.append((f"{name} over images", numbers.count(value), numbers.change(dense, value)))
        whole = facts["macs_with_gates"][name]
        rows.append((f"{name}, gates included", numbers.count(whole), numbers.change(dense, whole)))
    rows.append(("the gates alone", numbers.count(facts["gate_macs"]), ""))
    if facts.get("spearman") is not None:
        rows.append(("Spearman of MACs and loss", f"{facts['spearman']:.3f}", ""))
    if facts.get("baseline_accuracy") is not None:
        rows.append(("accuracy before gates (validation)", numbers.percent(facts["baseline_accuracy"]), ""))
    if facts.get("budgets"):
        rows.append(("stored budgets", ", ".join(facts["budgets"]), ""))
    return table(["MACs", "", "change"], rows)


def _runtimes(milliseconds: Mapping[str, float]) -> Any:
    dense = milliseconds["dense"]
    rows = [(name, numbers.milliseconds(value), f"{dense / value:.2f}×") for name, value in milliseconds.items()]
    return table(["runtime", "latency", "of dense speed"], rows)


def _layers(facts: Mapping[str, Any]) -> Any:
    rows = [
        (
            layer["layer"],
            str(layer["channels"]),
            numbers.percent(layer["kept"], decimals=1),
            str(layer["always"]),
            str(layer["never"]),
        )
        for layer in facts["layers"]
    ]
    return table(["gated layer", "channels", "kept", "always on", "never on"], rows)
