"""The nodes of an exported program, decoded, and running them one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prunekit.programs.ops import InputDevice, Ref, check_constants, function, value


@dataclass(frozen=True)
class Step:
    """One node: what is called, with which arguments, under which names the results go, and what is done with after.

    With a `layer`, the name of a module, that module is called on `args` instead.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[Any, ...]
    release: tuple[str, ...]
    layer: str = ""

    def arguments(self, values: Mapping[str, Any], device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """What is passed by position and by name, with `values` in their places."""
        args = [look_up(arg, values, device) for arg in self.args]
        return args, {key: look_up(arg, values, device) for key, arg in self.kwargs.items()}

    def run(self, values: dict[str, Any], device: torch.device, layers: Callable[[str], Callable[..., Any]]) -> None:
        """Compute from `values` by name, and put the results among them; `layers` finds modules by name."""
        args, kwargs = self.arguments(values, device)
        if self.layer:
            outcome = layers(self.layer)(*args)
            if len(self.results) > 1:  # statistics, which nothing reads in inference
                outcome = (outcome, *(None,) * (len(self.results) - 1))
        else:
            outcome = self.call(*args, **kwargs)
        _store(self.results, outcome, values)
        for name in self.release:
            values.pop(name, None)


def decode(nodes: list[dict[str, Any]], keep: set[str]) -> tuple[Step, ...]:
    """Decode the nodes; what no later node reads is released at once, so that memory holds what is alive."""
    steps: list[Step] = []
    alive = set(keep)
    for node in reversed(nodes):
        # kind 2 is a keyword; older files do not say, and mean a position
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
    """Raise `ValueError` where something is read that nothing before it has computed."""
    for reads, results in (*(((*step.args, *step.kwargs.values()), step.results) for step in steps), (outputs, ())):
        unknown = names(reads) - known
        if unknown:
            raise ValueError(f"'{min(unknown)}' is read before it is computed")
        known |= names(results)


def names(values: Iterable[Any]) -> set[str]:
    """The names of all computed values among arguments."""
    found: set[str] = set()
    for item in values:
        if isinstance(item, Ref):
            found.add(item.name)
        elif isinstance(item, list):
            found |= names(item)
    return found


def look_up(item: Any, values: Mapping[str, Any], device: torch.device) -> Any:
    """An argument with its computed values in their places."""
    if isinstance(item, Ref):
        return values[item.name]
    if isinstance(item, list):
        return [look_up(part, values, device) for part in item]
    return device if item is InputDevice else item


def _store(results: tuple[Any, ...], outcome: Any, values: dict[str, Any]) -> None:
    """Name what a node gave: nothing, one value, or several."""
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
