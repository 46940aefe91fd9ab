"""Networks that are recognised by the shapes of their weights, and what is known of each without building it.

The table, `known.json`, is written by `tools/known_networks.py`. Nothing here imports torch or torchvision.

A network's fingerprint is a sum over the shapes of its weights, so that neither their order nor their names count. The
rows of the classifier, which are the classes, are left out; as a state dict does not say which weight the classifier
is, a state dict has one fingerprint for each that it could be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

TABLE = Path(__file__).with_name("known.json")

# Counters that wrappers and profilers leave in a state dict.
COUNTERS = frozenset({"n_averaged", "total_ops", "total_params"})

# The auxiliary heads of Inception networks, used in training only.
TRAINING_HEADS = re.compile(r"^(aux[12]|AuxLogits)\.")

# Hashes in a sketch of a network's keys, and the least share of common ones that makes networks similar.
_SKETCH = 32
_SIMILAR = 0.1


@dataclass(frozen=True)
class Known:
    """A network by its name and arguments.

    Attributes:
        arch: The name that `--arch` takes.
        args: The arguments with which it has this fingerprint.
        fingerprint: See `fingerprint`.
        sketch: A sample of its keys, see `sketch`; empty where the arguments are not the usual ones, as is the rest.
        params: Its parameters.
        macs: Multiply-accumulates for one input.
        input: Shape of the input that it is meant for, (C, H, W).
    """

    arch: str
    args: Mapping[str, Any]
    fingerprint: str
    sketch: tuple[str, ...] = ()
    params: int | None = None
    macs: int | None = None
    input: tuple[int, ...] = ()


@cache
def table() -> tuple[Known, ...]:
    """Return all known networks: the bundled ones, then torchvision's."""
    entries = json.loads(TABLE.read_text(encoding="utf-8"))
    return tuple(
        Known(**{**entry, "sketch": tuple(entry.get("sketch", ())), "input": tuple(entry.get("input", ()))})
        for entry in entries
    )


def names() -> list[str]:
    """Return the names that `--arch` takes, torchvision's without its prefix."""
    return list(dict.fromkeys(one.arch.removeprefix("torchvision:") for one in table()))


def bundled() -> list[str]:
    """Return the names of prunekit's own networks."""
    return list(dict.fromkeys(one.arch for one in table() if not one.arch.startswith("torchvision:")))


def fitting(shapes: Shapes) -> list[Known]:
    """Return the known networks whose weights have these shapes, by any names and with any number of classes."""
    found = fingerprints(shapes)
    return [one for one in table() if one.fingerprint in found]


def nearest(shapes: Shapes) -> Known | None:
    """Return the known network that shares the most keys and shapes with these; None where none is similar."""
    own = sketch(shapes)
    score, best = max(((_similarity(own, one.sketch), one) for one in table() if one.sketch), key=lambda pair: pair[0])
    return best if score >= _SIMILAR else None


def fingerprint(shapes: Shapes, classifier: str) -> str:
    """Return the fingerprint of a network whose scores are made by the layer `classifier`."""
    counted = _counted(shapes)
    return _written(sum(map(_hash, counted.values())) + _without_classes(counted, f"{classifier}.weight"))


def fingerprints(shapes: Shapes) -> set[str]:
    """Return the fingerprints of these weights, one for each that may be the classifier's."""
    counted = _counted(shapes)
    total = sum(map(_hash, counted.values()))
    weights = [key for key, shape in counted.items() if len(shape) > 1 and key.endswith("weight")]
    return {_written(total + _without_classes(counted, key)) for key in weights}


def sketch(shapes: Shapes) -> tuple[str, ...]:
    """Return the smallest hashes of a network's keys, with their shapes and without.

    The share that two sketches have in common estimates the share of keys (Broder, On the resemblance and containment
    of documents, 1997). Names that stand before all keys alike, such as `module`, are left out.
    """
    counted = _counted(shapes)
    while len({key.partition(".")[0] for key in counted}) == 1 and all("." in key for key in counted):
        counted = {key.partition(".")[2]: shape for key, shape in counted.items()}
    items = {*counted, *(f"{key} {shape}" for key, shape in counted.items())}
    return tuple(sorted(blake2b(item.encode(), digest_size=4).hexdigest() for item in items)[:_SKETCH])


def _counted(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the weights without scalars (counters of batch norms) and what only training or profiling leaves."""
    return {
        key: tuple(shape)
        for key, shape in shapes.items()
        if len(shape) > 0 and key.rpartition(".")[2] not in COUNTERS and not TRAINING_HEADS.match(key)
    }


def _without_classes(shapes: Shapes, weight: str) -> int:
    """Return what to add to the sum of all shapes so that the rows of `weight`, and of its bias, do not count."""
    rows, *others = shapes[weight]
    bias = shapes.get(f"{weight.removesuffix('weight')}bias")
    removed = _hash(shapes[weight]) + (_hash(bias) if bias == (rows,) else 0)
    return _hash((-1 if bias == (rows,) else -2, *others)) - removed


def _hash(shape: Iterable[int]) -> int:
    return int.from_bytes(blake2b("x".join(map(str, shape)).encode(), digest_size=8).digest(), "big")


def _written(total: int) -> str:
    return f"{total % 2**64:016x}"


def _similarity(one: tuple[str, ...], other: tuple[str, ...]) -> float:
    least = sorted({*one, *other})[:_SKETCH]
    return len({*one} & {*other} & {*least}) / max(1, len(least))
