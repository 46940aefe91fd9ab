"""Write the table of known networks: `python tools/known_networks.py > src/prunekit/models/known.json`.

It takes some minutes, as every network is built and traced. A test compares the table with what this computes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

from prunekit import models
from prunekit.checkpoint.weights import empty
from prunekit.models import torchvision_zoo
from prunekit.models.known import Known, fingerprint, sketch
from prunekit.surgery import cost_of, trace
from prunekit.surgery.tracing.tracer import example_of

# Arguments of the bundled networks that are common, beside their defaults.
_WIDTHS = (1.0, 0.25, 0.5, 2.0)
_CHANNELS = (3, 1)
_USUAL_SIZE = {"image_size": 224}
# With a convolution in their shortcuts the residual networks were published in both orders.
_ORDERS: tuple[dict[str, str], ...] = (
    {},
    {"shortcut": "conv", "relu": "output"},
    {"shortcut": "conv", "relu": "input"},
)


def entries() -> Iterator[dict[str, Any]]:
    """The table, as it stands in the file."""
    for arch, args in variants():
        yield {key: value for key, value in dataclasses.asdict(known(arch, args)).items() if value not in ((), None)}


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every network with its usual arguments first, then with others that are common."""
    for name in models.names():
        usual = models.default_input(name)
        assert usual is not None
        channels = sorted(_CHANNELS, key=lambda number: number != usual.shape[0])
        orders = _ORDERS if name.startswith("resnet") else ({},)
        for order, width, number in itertools.product(orders, _WIDTHS, channels):
            args = {} if number == usual.shape[0] else {"in_channels": number}
            yield name, {**order, **({} if width == 1 else {"width": width}), **args}
    for name in torchvision_zoo.names():
        yield f"torchvision:{name}", {}
        others = [torchvision_zoo.variant_args(name, weights) for weights in torchvision_zoo.weight_names(name)]
        for args in [args for i, args in enumerate(others) if args not in ({}, _USUAL_SIZE, *others[:i])]:
            yield f"torchvision:{name}", args


def known(arch: str, args: dict[str, Any]) -> Known:
    """One network; its cost and keys where its arguments are the usual ones."""
    model = empty(arch, args)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    classifier = models.classifier(model)
    assert classifier is not None
    found = Known(arch, args, fingerprint(shapes, classifier))
    if args:
        return found
    spec = models.default_input(arch)
    assert spec is not None
    cost = cost_of(model, trace(model, example_of(model, (1, *spec.shape)), probe=False))
    return dataclasses.replace(
        found, sketch=sketch(shapes), params=cost.params, macs=cost.macs, input=tuple(spec.shape)
    )


def written(table: list[dict[str, Any]]) -> str:
    """The file: one line a network, so that a change shows which."""
    lines = (json.dumps(entry, separators=(",", ":")) for entry in table)
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    print(written(list(entries())), end="")
