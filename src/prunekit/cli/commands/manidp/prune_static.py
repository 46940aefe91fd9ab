"""`prunekit manidp prune-static`: remove the channels that gates never keep."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import (
    DATA,
    READING,
    DataOptions,
    ModelArgument,
    OutputOptions,
    ReadingOptions,
    device_option,
)
from prunekit.cli.models import STREAM, check_inputs, output_path, read_model, spec_of, write_model
from prunekit.errors import InputError
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output


@dataclass(frozen=True)
class StaticOptions:
    """How the gates are watched."""

    device: str | None = device_option()


def run(
    output: Output,
    model: ModelArgument,
    data: DataOptions,
    options: StaticOptions,
    where: OutputOptions,
    reading: ReadingOptions,
) -> None:
    """Observe the gates on the training images, remove the channels kept by none, verify and write the result."""
    target = output_path(model, where, "static", output)
    check_inputs(model, data, reading, images_needed=True)
    from prunekit import api
    from prunekit.methods.manidp.record import observe, unlabelled
    from prunekit.methods.manidp.static import prune_static
    from prunekit.methods.manidp.view import GatedView
    from prunekit.surgery import cost_of

    network, _ = read_model(model, reading, options.device)
    view = GatedView.of(network)
    if not view.layers:
        raise InputError(f"{model} has no gates", hint="prunekit manidp train makes a network that has")
    images = data.images(output, "train", spec_of(network), reading)
    record = observe(view, unlabelled(images.batches(250)))
    small, plan = prune_static(view, record)
    groups = {group.name: group.size for group in view.graph.groups}
    before, after = cost_of(network, view.graph).to_json(), api.inspect(small).cost.to_json()
    written = None if where.dry_run else write_model(small, target, output, force=where.force)
    never = sum(int((used == 0).sum()) for used in record.used)
    removed = sum(groups[keep.group] - len(keep.index) for keep in plan.keeps)
    output.note(f"{never} channels are never kept; {removed} were removed (the rest lie in streams)")
    if output.json:
        facts = {
            "output": written,
            "before": before,
            "after": after,
            "plan": plan.to_json(),
            "never_kept": never,
            "removed": removed,
        }
        output.document(document("manidp.prune-static", facts))
    elif written not in (None, STREAM):
        output.data(str(written))


COMMAND = Command(
    run,
    ("prunekit manidp prune-static half.pt --data digits -o smaller.pt",),
    {"data": DATA, "options": "Observation", "where": "Output", "reading": READING},
)
