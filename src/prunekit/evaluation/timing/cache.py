"""Layer times kept in the user's cache, one file for each set of conditions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.errors import InputError
from prunekit.evaluation.timing import table
from prunekit.evaluation.timing.conditions import Conditions
from prunekit.evaluation.timing.layers import LayerShape
from prunekit.evaluation.timing.table import Grid, LayerTimes
from prunekit.files.writing import atomic_write

_VERSION = 1  # of what is measured and how: another one is measured anew


def folder() -> Path:
    """Return the folder: `$PRUNEKIT_CACHE`, or `prunekit` in the user's cache (`$XDG_CACHE_HOME`, `~/.cache`)."""
    own = os.environ.get("PRUNEKIT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunekit"


def layer_times(shapes: Iterable[LayerShape], conditions: Conditions) -> LayerTimes:
    """Return the times of `shapes` from the cache, and measure those that it lacks.

    A damaged file is measured anew; a folder that cannot be written to costs the next run its time, no more.
    """
    path, shapes = path_of(conditions), list(shapes)
    known = read(path, conditions)
    times = table.measured(shapes, conditions, known)
    if known is None or times.grids.keys() != known.grids.keys():
        # another process may have measured other layers meanwhile
        latest = read(path, conditions)
        write(
            path,
            conditions,
            LayerTimes(times.overhead, times.block, {**(latest.grids if latest else {}), **times.grids}),
        )
    return times


def path_of(conditions: Conditions) -> Path:
    """Return the file for these conditions."""
    name = hashlib.sha256(json.dumps(conditions.to_json(), sort_keys=True).encode()).hexdigest()[:16]
    return folder() / "layer-times" / f"{conditions.runtime}-{name}.json"


def read(path: Path, conditions: Conditions) -> LayerTimes | None:
    """Return the times in a file; None where there is none, or not one of these conditions."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data["version"], data["conditions"]) != (_VERSION, conditions.to_json()):
            return None
        return LayerTimes(float(data["overhead"]), max(1, int(data["block"])), dict(map(_grid, data["layers"])))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write(path: Path, conditions: Conditions, times: LayerTimes) -> None:
    """Write the times to a file, whole or not at all."""
    layers = [
        {**asdict(shape), "grid": {**asdict(grid), "times": grid.times.tolist()}} for shape, grid in times.grids.items()
    ]
    whole = {"overhead": times.overhead, "block": times.block, "layers": layers}
    data = {"version": _VERSION, "conditions": conditions.to_json(), **whole}
    content = json.dumps(data).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda stream: stream.write(content), force=True)
    except (OSError, InputError):  # a cache that cannot be kept is no reason to fail
        return


def _grid(entry: dict[str, Any]) -> tuple[LayerShape, Grid]:
    grid = entry.pop("grid")
    inputs, outputs, times = tuple(grid["inputs"]), tuple(grid["outputs"]), np.array(grid["times"], dtype=np.float64)
    if times.shape != (len(inputs), len(outputs)) or not np.isfinite(times).all() or (times < 0).any():
        raise ValueError("damaged")
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return LayerShape(**fields), Grid(inputs, outputs, times)
