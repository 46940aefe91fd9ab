"""`prunekit manidp calibrate`: find the thresholds that meet budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import (
    DATA,
    READING,
    DataOptions,
    ModelArgument,
    OutputOptions,
    ReadingOptions,
    device_option,
    option,
)
from prunekit.cli.models import STREAM, check_inputs, output_path, read_model, spec_of, write_model
from prunekit.errors import InputError
from prunekit.methods.budget import check_amount
from prunekit.report import numbers
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from prunekit.data import ImageSet
    from prunekit.methods.manidp.thresholds import Calibration
    from prunekit.methods.manidp.view import GatedView


@dataclass(frozen=True)
class CalibrateOptions:
    """Budgets that the thresholds must meet, and the images to calibrate on."""

    target_macs: tuple[str, ...] | None = option(
        metavar="AMOUNT,...", help="Mean MACs of an image, gates not counted: 50% of dense, or 20M; several are stored."
    )
    images: int = option(2000, help="Training images to calibrate on; their labels are not read.")
    foresee: float = option(
        0.0, help="First let gates guess anew which images are hard, and keep more for those: 1 is moderate."
    )
    buckets: int | None = option(help="Also cut this many static sub-networks, for --runtime buckets.")
    seed: int = option(0, help="Seed of the choice of images and of the clustering.")

    device: str | None = device_option()

    def check(self) -> None:
        """Raise `InputError`, before torch is imported, for values out of range, or where there is nothing to do."""
        if not self.target_macs and self.buckets is None:
            raise InputError("nothing to calibrate", hint="say --target-macs 50%, or several: 40%,50%,60%")
        for amount in self.target_macs or ():
            check_amount("--target-macs", amount)
        for name in ("images", "buckets"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, not {value}")
        if not 0 <= self.foresee < math.inf:
            raise InputError(f"--foresee must be at least 0, not {self.foresee:g}")


def run(
    output: Output,
    model: ModelArgument,
    data: DataOptions,
    options: CalibrateOptions,
    where: OutputOptions,
    reading: ReadingOptions,
) -> None:
    """Calibrate the thresholds of each budget, store them, and set those of the first."""
    options.check()
    target = output_path(model, where, "calibrated", output)
    check_inputs(model, data, reading, images_needed=True)
    from prunekit.methods.manidp.difficulty import foresee
    from prunekit.methods.manidp.view import GatedView

    network, _ = read_model(model, reading, options.device)
    view = GatedView.of(network)
    if not view.layers:
        raise InputError(f"{model} has no gates", hint="prunekit manidp train makes a network that has")
    train_set = data.images(output, "train", spec_of(network), reading).sample(options.images, seed=options.seed)
    if options.foresee:
        foresee(network, train_set.inputs(), options.foresee)
    found = _calibrate(output, view, train_set, options.target_macs or ())
    facts: dict[str, Any] = {
        "foresee": options.foresee,
        "budgets": {name: item.to_json() for name, item in found.items()},
    }
    if options.buckets is not None:
        facts["buckets"] = _buckets(output, view, train_set, options)
    _remember(network, facts)
    written = None if where.dry_run else write_model(network, target, output, force=where.force)
    if output.json:
        macs = {"dense_macs": view.cost.dense, "gate_macs": view.cost.gates}
        output.document(document("manidp.calibrate", {"output": written, **macs, "buckets": None, **facts}))
    elif written not in (None, STREAM):
        output.data(str(written))


def _calibrate(output: Output, view: GatedView, images: ImageSet, amounts: Sequence[str]) -> dict[str, Calibration]:
    from prunekit.methods.budget import read_amount
    from prunekit.methods.manidp.budgets import calibrate_all

    dense = view.cost.dense
    targets = {amount: read_amount("--target-macs", amount, dense) for amount in amounts}
    found = calibrate_all(view, lambda: images.batches(250), targets)
    for amount, budget in found.items():
        output.note(
            f"{amount}: {numbers.count(budget.realised)} MACs an image on average, "
            f"{numbers.percent(budget.realised / dense)} of {numbers.count(dense)}"
        )
    return found


def _buckets(output: Output, view: GatedView, images: ImageSet, options: CalibrateOptions) -> dict[str, Any]:
    from prunekit.methods.manidp.runtimes.buckets import add_buckets, bucketed

    right = add_buckets(view, images.inputs(), int(options.buckets or 0), seed=options.seed)
    macs = list(bucketed(view.model).macs)
    output.note(
        f"{len(macs)} sub-networks of {', '.join(map(numbers.count, macs))} MACs; the router sends "
        f"{numbers.percent(right, decimals=1)} of these images to the one that they belong to"
    )
    return {"macs": macs, "router_accuracy": right}


def _remember(network: Any, facts: dict[str, Any]) -> None:
    from prunekit.spec import origin_of, remember

    origin = origin_of(network)
    if origin is not None:
        remember(network, origin.after({"method": "manidp calibrate", **facts}))


COMMAND = Command(
    run,
    (
        "prunekit manidp calibrate gated.pt --data digits --target-macs 50% -o half.pt",
        "prunekit manidp calibrate gated.pt --data path/to/images --target-macs 40%,50%,60%",
        "prunekit manidp calibrate gated.pt --data path/to/images --target-macs 50% --foresee 1",
        "prunekit manidp calibrate gated.pt --data path/to/images --target-macs 50% --buckets 4",
    ),
    {"data": DATA, "options": "Calibration", "where": "Output", "reading": READING},
)
