"""The `buckets` runtime as files that need neither prunekit nor the model's code: a router and K static networks.

A folder of `router`, `bucket-0`, `bucket-1`, … and `buckets.json`, which says how they go together: the router's
largest score is the number of the bucket whose network classifies the image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.errors import InputError
from prunekit.exporting.interface import INPUT, OUTPUT
from prunekit.exporting.parity import Batch, Parity, compare, require
from prunekit.exporting.writer import ExportOptions, Format, random_batches, running, written
from prunekit.files.writing import atomic_folder
from prunekit.methods.manidp.runtimes.buckets import Bucketed, bucketed
from prunekit.spec import Origin, origin_of, remember
from prunekit.surgery.tracing.tracer import example_of

INDEX = "buckets.json"
OURS = re.compile(r"(router|bucket-\d+)\.(onnx|pt2)|buckets\.json")
"""The names of files that a folder of an earlier export has."""


@dataclass(frozen=True)
class ExportedBuckets:
    """The `files` by name, and how they compare, together, with the bucketed network in PyTorch."""

    format: Format
    files: Mapping[str, bytes] = field(repr=False)
    parity: Parity
    opset: int | None
    folded: tuple[str, ...] = ()
    inputs: tuple[str, ...] = (INPUT,)
    outputs: tuple[str, ...] = (OUTPUT,)

    @property
    def networks(self) -> list[bytes]:
        """The router, and the network of each bucket."""
        return [content for name, content in self.files.items() if name != INDEX]

    @property
    def size(self) -> int:
        """Bytes, of all files."""
        return sum(map(len, self.files.values()))


def export_buckets(
    model: nn.Module,
    format: Format,
    options: ExportOptions | None = None,
    images: Iterable[Batch] | None = None,
) -> ExportedBuckets:
    """Return the sub-networks of the gated `model` and their router as files, checked one by one and all together.

    `images` are normalised batches, with their labels where known; without them inputs are random.

    Raises:
        InputError: no sub-networks are stored in the network, or a fixed batch other than one.
        SurgeryError: a part cannot be exported.
        CheckFailed: the files compute something else than the sub-networks do.
    """
    options = options or ExportOptions()
    if options.fixed_batch not in (None, 1):
        raise InputError(
            f"sub-networks get as many images of a batch as are theirs, not always {options.fixed_batch}",
            hint="--fixed-batch 1 runs one image at a time; without it any size will do",
        )
    runner = bucketed(model).cpu()
    origin = origin_of(model) or Origin("")
    assert origin.input is not None  # without it nothing could have been cut
    x = example_of(model, (1, *origin.input.shape))
    remember(runner.router, Origin("", input=origin.input))
    parts = {"router": runner.router, **{f"bucket-{i}": network for i, network in enumerate(runner.networks)}}
    plain = dataclasses.replace(options, fold_bn=False)  # theirs are folded already
    done, runtimes = {}, []
    with contextlib.ExitStack() as stack:
        for name, part in parts.items():
            done[f"{name}.{format}"] = one = written(part, x, format, plain)
            runtimes.append(stack.enter_context(running(one.content, format, model)))
            inputs = random_batches(part, x, options.fixed_batch)
            found = compare(part, runtimes[-1], inputs, options.fixed_batch, options.tolerance)
            require(found, options.tolerance, 0, name)
        together = Bucketed(runtimes[0], runtimes[1:])
        batches = images if images is not None else random_batches(model, x, options.fixed_batch)
        parity = compare(runner, together, batches, options.fixed_batch, options.tolerance)
    require(parity, options.tolerance, options.min_agreement, "sub-networks")
    files = {name: one.content for name, one in done.items()}
    files[INDEX] = _index(runner, origin, format, list(done)).encode()
    return ExportedBuckets(format, files, parity, next(iter(done.values())).opset)


def write_buckets(done: ExportedBuckets, folder: str | Path, *, force: bool = False) -> None:
    """Write the files into a new `folder`, whole or not at all; with `force` in the place of an earlier export.

    Raises:
        InputError: the folder exists, or holds other things than an export, or cannot be written.
    """
    atomic_folder(folder, done.files, OURS if force else None)


def _index(runner: Bucketed, origin: Origin, format: Format, names: list[str]) -> str:
    router, *buckets = names
    facts: dict[str, Any] = {
        "schema": "prunekit.buckets",
        "version": 1,
        "format": format,
        "input": origin.input.to_json() if origin.input else None,
        "classes": list(origin.classes),
        "router": router,
        "buckets": [{"file": name, "macs": cost} for name, cost in zip(buckets, runner.macs, strict=True)],
    }
    return json.dumps(facts, indent=2) + "\n"
