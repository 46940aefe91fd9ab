"""`prunekit inspect`: what a network is made of, what of it can be pruned, and what was done to it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from prunekit.cli.build import Command
from prunekit.cli.models import describe_source, read_model, spec_of
from prunekit.cli.options import READING, ModelArgument, ReadingOptions
from prunekit.report.documents import document
from prunekit.report.output import Output

if TYPE_CHECKING:
    from torch import nn

    from prunekit.surgery import ChannelGroup, Cost


def run(output: Output, model: ModelArgument, reading: ReadingOptions) -> None:
    """Trace the model, and show its layers, its channel groups, what is frozen and its history."""
    from prunekit import api
    from prunekit.surgery.groups import frozen_by_reason

    network, size = read_model(model, reading)
    spec_of(network)
    found = api.inspect(network)
    facts = {
        "model": describe_source(model),
        **_identity(network),
        **_cost(found.cost, size),
        "groups": [_group(group) for group in found.groups],
        "frozen": frozen_by_reason(found.groups),
    }
    if output.json:
        output.document(document("inspect", facts))
        return
    from prunekit.report.inspection import inspection

    output.table(inspection(facts), data=True)


def _identity(network: nn.Module) -> dict[str, Any]:
    """Where the network comes from, as far as it knows."""
    from prunekit.spec import origin_of

    origin = origin_of(network)
    if origin is None:
        return {"arch": None, "arch_args": {}, "input": None, "classes": [], "history": []}
    return {
        "arch": origin.arch,
        "arch_args": dict(origin.arch_args),
        "input": origin.input.to_json() if origin.input else None,
        "classes": list(origin.classes),
        "history": [dict(step) for step in origin.history],
    }


def _cost(cost: Cost, size: int | None) -> dict[str, Any]:
    return {"bytes": size, **cost.to_json(), "layers": [dict(vars(layer)) for layer in cost.layers]}


def _group(group: ChannelGroup) -> dict[str, Any]:
    """One group: its channels, how many of them can go, and the layers that make and read them."""
    return {
        "name": group.name,
        "channels": group.size,
        "removable": len(group.free),
        "producers": _modules(group.producers),
        "consumers": _modules(group.consumers),
        "frozen": dict(Counter(group.frozen.values())),
    }


def _modules(members: Any) -> list[str]:
    return list(dict.fromkeys(member.module for member in members))


COMMAND = Command(
    run,
    (
        "prunekit inspect model.pt",
        "prunekit inspect weights.pth --arch resnet20_cifar",
        "prunekit inspect torchvision:resnet50",
        "prunekit inspect model.pt --json | jq '.groups[] | select(.removable == 0)'",
    ),
    {"reading": READING},
)
