"""Imports run one way, from room to room and from file to file, and the light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import prunekit

ROOT = Path(prunekit.__file__).parent
# Whoever stands further down may import what stands further up: rooms, and the rooms in them.
ROOMS = {
    "": [
        *(
            "lazy",
            "errors",
            "devices",
            "progress",
            "plugins",
            "spec",
            "plan",
            "files",
            "nn",
            "surgery",
            "models",
            "metric",
            "data",
            "tasks",
            "programs",
            "exporting",
        ),
        *("checkpoint", "evaluation", "training", "restoration", "healing", "methods", "api", "workflows"),
        *("report", "cli"),
    ],
    "surgery": [
        *("ops", "copying", "unwrap", "execution", "graph", "editing", "tracing", "proof", "cost"),
        "structure",
    ],
    "surgery.tracing": ["recorder", "rules", "runs", "follow", "counted", "narrow", "probe", "inside", "tracer"],
    "methods": [
        "goal",
        "base",
        "budget",
        "partial",
        "search",
        "ranking",
        "streams",
        "scoring",
        "registry",
        "slim",
        "merge",
        "narrow_heads",
        "baselines",
        "manidp",
    ],
    "api": ["results", "subject", "latency", "files", "by_hand", "pruning", "methods", "own_loop"],
    "report": ["numbers", "text", "provenance", "documents", "terminal", "pictures", "pages"],
    "cli": [
        *("framework", "named_code", "times", "models", "inputs", "history", "gates", "measuring", "gate_runtimes"),
        *("healing", "tuning", "resuming", "sweep_file", "sweep_arguments", "fit_file", "fitting"),
        *("quantising", "commands", "app"),
    ],
}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def _imported(name: str) -> frozenset[str]:
    """The files that a file imports, anywhere in it, for types as well."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {one.removeprefix("prunekit.") for one in found if one.startswith("prunekit.")}
    return frozenset((inside & FILES.keys()) - {name, ""})


def _within(name: str, room: str) -> str | None:
    """Which part of a room a file belongs to; None for a file elsewhere, and for the room's own `__init__`."""
    if not room:
        return name.partition(".")[0] or None
    return name.removeprefix(f"{room}.").partition(".")[0] if name.startswith(f"{room}.") else None


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_downwards(room: str) -> None:
    order = ROOMS[room]
    upwards = []
    for name in FILES:
        here = _within(name, room)
        if here is None or here == "__main__":
            continue
        parts = {other: part for other in _imported(name) if (part := _within(other, room)) is not None}
        upwards += [f"{name} imports {other}" for other, part in parts.items() if order.index(part) > order.index(here)]
    assert not upwards, "\n".join(upwards)


@pytest.mark.parametrize("room", ROOMS)
def test_every_part_of_a_room_has_its_place(room: str) -> None:
    assert {_within(name, room) for name in FILES} - {None, "__main__"} == set(ROOMS[room])


def test_no_files_import_each_other_in_a_circle() -> None:
    packages = {name for name, path in FILES.items() if path.stem == "__init__"}
    graph = {name: _imported(name) - packages for name in FILES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "module",
    [
        *("prunekit", "prunekit.cli", "prunekit.training.config", "prunekit.methods.manidp.config"),
        *("prunekit.methods.slim.method", "prunekit.methods.merge.method"),
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
