"""The nodes of an exported program, decoded, and their execution in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prunekit.programs.ops import InputDevice, Ref, check_constants, function, value


@dataclass(frozen=True)
class Step:
    """One node: what it calls, its arguments, the names of its results, and the values to release afterwards.

    With a `layer`, the name of a module, that module is called on `args` instead.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[Any, ...]
    release: tuple[str, ...]
    layer: str = ""

    def arguments(self, values: Mapping[str, Any], device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and keyword arguments with `values` substituted."""
        args = [look_up(arg, values, device) for arg in self.args]
        return args, {key: look_up(arg, values, device) for key, arg in self.kwargs.items()}

    def run(self, values: dict[str, Any], device: torch.device, layers: Callable[[str], Callable[..., Any]]) -> None:
        """Compute from `values` by name and add the results to them; `layers` finds modules by name."""
        args, kwargs = self.arguments(values, device)
        if self.layer:
            outcome = layers(self.layer)(*args)
            if len(self.results) > 1:  # batch statistics, which nothing reads in inference
                outcome = (outcome, *(None,) * (len(self.results) - 1))
        else:
            outcome = self.call(*args, **kwargs)
        _store(self.results, outcome, values)
        for name in self.release:
            values.pop(name, None)


def decode(nodes: list[dict[str, Any]], keep: set[str]) -> tuple[Step, ...]:
    """Decode the nodes; a value is released after its last reader, so that only live values occupy memory."""
    steps: list[Step] = []
    alive = set(keep)
    for node in reversed(nodes):
        # kind 2 is a keyword; older files give no kind and mean a position
        args = tuple(value(item["arg"]) for item in node["inputs"] if item.get("kind") != 2)
        kwargs = {item["name"]: value(item["arg"]) for item in node["inputs"] if item.get("kind") == 2}
        results = tuple(value(output) for output in node["outputs"])
        used = names((*args, *kwargs.values(), *results))
        call = function(node["target"])
        check_constants(call, args, kwargs)
        steps.append(Step(call, args, kwargs, results, tuple(used - alive)))
        alive |= used
    return tuple(reversed(steps))


def check_order(steps: Iterable[Step], outputs: tuple[Any, ...], known: set[str]) -> None:
    """Raise `ValueError` where a step reads something that none before it has computed."""
    for reads, results in (*(((*step.args, *step.kwargs.values()), step.results) for step in steps), (outputs, ())):
        unknown = names(reads) - known
        if unknown:
            raise ValueError(f"'{min(unknown)}' is read before it is computed")
        known |= names(results)


def names(values: Iterable[Any]) -> set[str]:
    """Return the names of all computed values among the arguments."""
    found: set[str] = set()
    for item in values:
        if isinstance(item, Ref):
            found.add(item.name)
        elif isinstance(item, list):
            found |= names(item)
    return found


def look_up(item: Any, values: Mapping[str, Any], device: torch.device) -> Any:
    """Return an argument with computed values substituted."""
    if isinstance(item, Ref):
        return values[item.name]
    if isinstance(item, list):
        return [look_up(part, values, device) for part in item]
    return device if item is InputDevice else item


def _store(results: tuple[Any, ...], outcome: Any, values: dict[str, Any]) -> None:
    """Name the results of a node: none, one value, or several."""
    if len(results) == 1:
        _name(results[0], outcome, values)
    elif results:
        _name(list(results), outcome, values)


def _name(result: Any, computed: Any, values: dict[str, Any]) -> None:
    if isinstance(result, Ref):
        values[result.name] = computed
    elif isinstance(result, list):
        for part, piece in zip(result, computed, strict=True):
            _name(part, piece, values)
