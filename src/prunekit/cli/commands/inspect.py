"""`prunekit inspect`: layers of a network, the channels that can be pruned, and its history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prunekit.cli import gates
from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import (
    DATA,
    READING,
    DataOptions,
    ModelArgument,
    ReadingOptions,
    device_option,
    option,
)
from prunekit.cli.models import check_inputs, check_report, describe_source, open_for, read_model, spec_of, write_report
from prunekit.errors import InputError, PrunekitError
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import nn

    from prunekit.api import Inspection
    from prunekit.data import Examples
    from prunekit.restoration.images import Images
    from prunekit.surgery import ChannelGroup, Cost

_GATES = (
    "the network has gates: slim and merge come before them, and "
    "prunekit manidp prune-static removes the channels that no image keeps"
)


@dataclass(frozen=True)
class InspectOptions:
    """Further inspections, and where the result goes."""

    html: str | None = option(metavar="FILE", help="Write one self-contained page there.")
    force: bool = option(False, help="Replace that file if it exists.")
    sensitivity: bool = option(
        False, help="Measure how much of the score each channel group costs when it alone is pruned (needs --data)."
    )
    restored: bool = option(
        False,
        help="Refit what reads the group first, to 64 training images, and measure what the outputs lose as well.",
    )
    ratios: tuple[float, ...] = option((0.25, 0.5, 0.75), help="Shares of a group to remove for that.")
    images: int = option(1000, metavar="COUNT", help="Images to measure that on, evenly chosen from the test images.")

    device: str | None = device_option()

    def check(self, data: DataOptions) -> None:
        """Raise `InputError`, before any work, for flags that exclude each other."""
        check_report(self.html, force=self.force)
        if self.sensitivity and not data.given:
            raise InputError("--sensitivity needs images", hint="say which with --data")
        if data.given and not self.sensitivity:
            raise InputError("--data is for --sensitivity", hint="prunekit eval measures the accuracy")
        if self.restored and not self.sensitivity:
            raise InputError("--restored is for --sensitivity", hint="add --sensitivity and --data")
        if self.images < 1:
            raise InputError(f"--images must be at least 1, not {self.images}")


def run(
    output: Output, model: ModelArgument, options: InspectOptions, data: DataOptions, reading: ReadingOptions
) -> None:
    """Trace the model and show its layers, channel groups, frozen groups and history."""
    options.check(data)
    check_inputs(model, data, reading)
    from prunekit import api
    from prunekit.data import ImageSet
    from prunekit.surgery.graph.groups import frozen_by_reason
    from prunekit.workflows.calibration import example_for

    network, size = read_model(model, reading, options.device if options.sensitivity else "cpu")
    images = open_for(output, network, data, "test", reading) if options.sensitivity else None
    if images is None or isinstance(images, ImageSet):
        spec_of(network)
    found = api.inspect(network, example_for(images))
    groups = _kept_by_gates(found.groups) if gates.has_gates(network) else found.groups
    facts = {
        "model": describe_source(model),
        **_identity(network),
        **_cost(found.cost, size),
        "original": _original(network),
        "groups": [_group(group) for group in groups],
        "frozen": frozen_by_reason(groups),
        "sensitivity": images and _sensitivity(output, network, found, options, data, reading, images),
    }
    if options.html is not None:
        from prunekit.report.pages.inspection import inspection_page

        write_report(options.html, inspection_page(facts), force=options.force)
        output.note(f"wrote {options.html}")
    if output.json:
        output.document(document("inspect", facts))
        return
    from prunekit.report.terminal.inspection import inspection

    output.table(inspection(facts), data=True)


def _identity(network: nn.Module) -> dict[str, Any]:
    """Return the origin of the network, as far as it is known."""
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


def _original(network: nn.Module) -> dict[str, Any] | None:
    """Return cost and widths of the unpruned architecture; None where nothing was pruned or it is unknown."""
    from prunekit import api
    from prunekit.checkpoint import weights
    from prunekit.spec import origin_of
    from prunekit.surgery.tracing.tracer import example_of

    origin = origin_of(network)
    if origin is None or not origin.arch or origin.input is None:
        return None
    if not any("plan" in step or "passes" in step for step in origin.history):
        return None
    try:
        fresh = weights.empty(origin.arch, origin.arch_args)
        cost = api.inspect(fresh, example_of(fresh, (1, *origin.input.shape))).cost
    except PrunekitError:  # its code is missing by now; everything else about the file still holds
        return None
    return {**cost.to_json(), "widths": {layer.name: layer.channels for layer in cost.layers if layer.channels}}


def _kept_by_gates(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return the groups of a network with gates, from which methods remove nothing."""
    return [replace(g, frozen=dict.fromkeys(range(g.size), _GATES) | dict(g.frozen)) for g in groups]


def _group(group: ChannelGroup) -> dict[str, Any]:
    """Return one group as JSON: its channels, how many can be removed, and the layers that make and read them."""
    return {
        "name": group.name,
        "channels": group.size,
        "removable": len(group.free),
        "producers": _modules(group.producers),
        "consumers": _modules(group.consumers),
        "frozen": dict(Counter(group.frozen.values())),
    }


def _sensitivity(
    output: Output,
    network: nn.Module,
    found: Inspection,
    options: InspectOptions,
    data: DataOptions,
    reading: ReadingOptions,
    images: Examples,
) -> dict[str, Any]:
    """Return the present score, and for each group that with some of its channels removed."""
    from prunekit.evaluation.score import scored
    from prunekit.workflows.sensitivity import sensitivity

    chosen = images.sample(min(options.images, len(images)), seed=0)
    source = _to_restore_from(output, network, data, reading) if options.restored else None
    groups = sensitivity(network, found.graph, chosen, options.ratios, restore_from=source)
    whole = scored(network, chosen)
    accuracy = {} if whole.accuracy is None else {"accuracy": whole.accuracy}
    facts = {"score": whole.value, "metric": whole.metric.to_json(), **accuracy}
    return {**facts, "images": len(chosen), "noun": images.noun, "groups": [group.to_json() for group in groups]}


def _to_restore_from(output: Output, network: nn.Module, data: DataOptions, reading: ReadingOptions) -> Images:
    """Return what the network reads of training examples, without their labels."""
    from prunekit.restoration.narrowed_alone import IMAGES
    from prunekit.tasks.sets import all_inputs

    train = open_for(output, network, data, "train", reading)
    found: Images = all_inputs(train.sample(min(IMAGES, len(train)), seed=0))
    return found


def _modules(members: Any) -> list[str]:
    return list(dict.fromkeys(member.module for member in members))


COMMAND = Command(
    run,
    (
        "prunekit inspect model.pt",
        "prunekit inspect weights.pth --arch resnet20_cifar",
        "prunekit inspect torchvision:resnet50 --html resnet50.html",
        "prunekit inspect model.pt --sensitivity --data digits",
        "prunekit inspect model.pt --sensitivity --restored --data digits --ratios .5,.75",
        "prunekit inspect model.pt --json | jq '.groups[] | select(.removable == 0)'",
    ),
    {"options": "Looking closer", "data": DATA, "reading": READING},
)
