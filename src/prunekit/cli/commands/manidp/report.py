"""`prunekit manidp report`: what gates keep on a data set, and at what cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

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
from prunekit.cli.models import beside, check_inputs, describe_source, read_model, spec_of
from prunekit.errors import InputError
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from prunekit.cli.framework.options import Split


@dataclass(frozen=True)
class ReportOptions:
    """Extent and destination of the report."""

    out: str | None = option(flag="--output,-o", metavar="FILE", help="The page to write (default: MODEL-gates.html).")
    pictures: str | None = option(metavar="FOLDER", help="Also draw its charts as PNG there (needs Matplotlib).")
    force: bool = option(False, help="Replace the page if it exists.")
    split: str = option("test", choices=("test", "val", "train"), help="Split of the data set.")
    budget: str | None = option(metavar="NAME", help="Thresholds stored by manidp calibrate under this name.")
    device: str | None = device_option()


def run(
    output: Output, model: ModelArgument, data: DataOptions, options: ReportOptions, reading: ReadingOptions
) -> None:
    """Observe the gates on the images and write the report."""
    target = Path(options.out) if options.out else beside(model, "gates").with_suffix(".html")
    if target.exists() and not options.force:
        raise InputError(f"{target} exists", hint="replace it with --force, or choose another name with -o")
    check_inputs(model, data, reading, images_needed=True)
    from prunekit.files.writing import atomic_write
    from prunekit.methods.manidp.budgets import use_budget
    from prunekit.methods.manidp.gate_report import portray
    from prunekit.methods.manidp.view import GatedView
    from prunekit.report.pages.gates import gates_page

    network, _ = read_model(model, reading, options.device)
    view = GatedView.of(network)
    if not view.layers:
        raise InputError(f"{model} has no gates", hint="prunekit manidp train makes a network that has")
    if options.budget is not None:
        use_budget(network, options.budget)
    images = data.images(output, cast("Split", options.split), spec_of(network), reading)
    portrait = portray(view, images)
    if options.pictures is not None:
        from prunekit.report.pictures.gates import draw_gates

        draw_gates(portrait, images, Path(options.pictures))
    content = gates_page(describe_source(model), portrait, images).encode()
    atomic_write(target, lambda stream: stream.write(content), force=options.force)
    if output.json:
        facts = {
            "output": str(target),
            "accuracy": portrait.record.accuracy,
            "gates": portrait.result.to_json(),
            "sweep": [{"macs": macs, "accuracy": accuracy} for macs, accuracy in portrait.sweep],
            "alignment": portrait.alignment,
            "classes": {name: {"macs": macs, "accuracy": a} for name, (macs, a) in portrait.classes.items()},
        }
        output.document(document("manidp.report", facts))
    else:
        output.data(str(target))


COMMAND = Command(
    run,
    (
        "prunekit manidp report half.pt --data digits -o half.html",
        "prunekit manidp report gated.pt --data path/to/images --budget 50% --pictures charts/",
    ),
    {"data": DATA, "options": "Report", "reading": READING},
)
