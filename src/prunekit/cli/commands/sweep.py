"""`prunekit sweep`: methods over ratios, one table and picture; an interrupted sweep can be resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli.framework.build import Command
from prunekit.cli.framework.fields import from_text
from prunekit.cli.framework.options import DATA, READING, DataOptions, ModelArgument, ReadingOptions, option
from prunekit.cli.measuring import MeasureOptions, measure, open_images, warn_of_balance
from prunekit.cli.models import (
    STREAM,
    beside,
    check_inputs,
    check_report,
    describe_source,
    read_model,
    spec_of,
    write_report,
)
from prunekit.errors import InputError
from prunekit.report.documents import document, dumps
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunekit.evaluation.score import EvalResult
    from prunekit.workflows.sweeps import SweepPoint, Variant

_MOST = 1000  # points: a larger number is a typing error

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME[:KEY=VALUE,...]",
        help="A method, perhaps with settings; give it again for more. By default all installed ones.",
    ),
]


@dataclass(frozen=True)
class SweepOptions:
    """Points of the sweep, and where they go."""

    ratios: str = option("0.1:0.9:0.1", metavar="R,...|FROM:TO:STEP", help="Shares of channels to remove.")
    out: str | None = option(
        flag="--output,-o", metavar="FILE", help="File for the points, as JSON; by default beside the model."
    )
    resume: bool = option(False, help="Go on with the points of that file; more ratios and methods may be asked for.")
    force: bool = option(False, help="Replace files that exist.")
    calibration: int = option(1000, metavar="COUNT", help="Training images to restore from, without labels.")
    format: str = option("table", choices=("table", "csv", "markdown"), help="Format of the result on standard output.")
    picture: str | None = option(metavar="FILE", help="Draw accuracy against MACs and the ratio there.")
    html: str | None = option(metavar="FILE", help="Write one self-contained page there.")


def run(
    output: Output,
    model: ModelArgument,
    *,
    method: Methods = None,
    sweep: SweepOptions,
    data: DataOptions,
    options: MeasureOptions,
    reading: ReadingOptions,
) -> None:
    """Measure the model, then every method at every ratio that is not yet known."""
    options.check()
    check_inputs(model, data, reading)
    from prunekit.workflows import sweeps

    ratios, variants, target = read_ratios(sweep.ratios), _variants(method), _target(model, sweep, data)
    if len(ratios) * len(variants) > _MOST:
        raise InputError(f"{len(ratios) * len(variants)} points are more than {_MOST}")
    network, _ = read_model(model, reading)
    spec_of(network)
    header = {"model": describe_source(model), "weights": sweeps.fingerprint(network), "data": data.data}
    kept = _Kept(target, {**header, "split": options.split, "calibration": sweep.calibration})
    known = kept.points(resume=sweep.resume, force=sweep.force)
    images = open_images(output, network, data, options, reading)

    def measured(pruned: nn.Module, name: str) -> EvalResult:
        return measure(pruned, name, images, options)

    base = kept.base or measured(network, describe_source(model))
    warn_of_balance(output, base)
    kept.write(base, known)

    def keep(points: Sequence[SweepPoint]) -> None:
        kept.write(base, points)
        _say(output, points[-1])

    calibration = _calibration(output, network, data, sweep.calibration, reading)
    points = sweeps.sweep(network, variants, ratios, measured, images=calibration, known=known, on_point=keep)
    _report(output, target, base, points, sweep, kept.document(base, points))


def read_ratios(text: str) -> list[float]:
    """Parse `0.1,0.5` or `0.1:0.9:0.2` (both ends included) into ascending ratios.

    Raises:
        InputError: The text has no numbers, or one that is not between 0 and 1.
    """
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            count = int((last - first) / step + 1e-9) + 1 if step > 0 else 0
            found = [round(first + i * step, 10) for i in range(min(count, _MOST))]
        else:
            found = [float(part) for part in text.split(",") if part.strip()]
    except (ValueError, OverflowError):
        found = []
    if not found or not all(0 < ratio < 1 for ratio in found):
        raise InputError(
            f"--ratios '{text}' are not shares between 0 and 1", hint="expected for example 0.2,0.5 or 0.1:0.9:0.1"
        )
    return sorted(set(found))


def _variants(given: list[str] | None) -> list[Variant]:
    """Return the requested methods, with their settings checked."""
    from prunekit import api
    from prunekit.methods import registry
    from prunekit.workflows.sweeps import Variant

    variants: dict[str, Variant] = {}
    for text in given or registry.names():
        name, _, settings = text.partition(":")
        variant = Variant(name, from_text(registry.get(name).Config, settings))
        if set(variant.settings) & {"ratio", "target_macs", "target_params"}:
            raise InputError(f"--method {text} says how much is to go", hint="--ratios says that")
        api.make_config(name, **variant.settings)
        variants[variant.label] = variant
    return list(variants.values())


def _target(source: str, sweep: SweepOptions, data: DataOptions) -> Path:
    """Return the file of the points, after checking that everything can be written."""
    if sweep.out == STREAM or (sweep.out is None and source == STREAM):
        raise InputError("a sweep keeps its points in a file", hint="name one with -o FILE")
    if sweep.calibration < 1:
        raise InputError(f"--calibration must be at least 1, not {sweep.calibration}")
    check_report(sweep.html, force=sweep.force)
    check_report(sweep.picture, force=sweep.force)
    if sweep.picture is not None:
        from prunekit.report.pictures.png import check_picture

        check_picture(sweep.picture)
        if data.data is None:
            raise InputError("a picture of accuracies needs images", hint="say which with --data")
    path = Path(sweep.out) if sweep.out is not None else beside(source, "sweep", ".json")
    check_report(str(path), force=True)
    return path


class _Kept:
    """The file that holds a sweep while it runs, and after: its own JSON document."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self.base: EvalResult | None = None

    def points(self, *, resume: bool, force: bool) -> list[SweepPoint]:
        """Return the points of an earlier run with `resume`; none where a new sweep begins."""
        from prunekit.workflows.sweeps import SweepPoint, result_from_json

        if not self.path.exists():
            return []
        if not resume:
            if force:
                return []
            raise InputError(f"{self.path} exists", hint="--resume goes on with it, --force begins anew")
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            before = {key: found[key] for key in self.header}
            self.base = result_from_json(found["base"])
            points = [SweepPoint.from_json(point) for point in found["points"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self.path} is not a sweep that could go on: {error}") from error
        differing = [key for key in self.header if key != "model" and before[key] != self.header[key]]
        if differing:
            raise InputError(f"{self.path} is a sweep of other {' and '.join(differing)}", hint="name another with -o")
        return points

    def document(self, base: EvalResult, points: Sequence[SweepPoint]) -> dict[str, Any]:
        """Return the document of all known points."""
        fields = {**self.header, "base": base.to_json(), "points": [point.to_json() for point in points]}
        return document("sweep", {"output": str(self.path), **fields})

    def write(self, base: EvalResult, points: Sequence[SweepPoint]) -> None:
        """Write the points known so far."""
        write_report(str(self.path), dumps(self.document(base, points)) + "\n", force=True)


def _calibration(
    output: Output, network: nn.Module, data: DataOptions, count: int, reading: ReadingOptions
) -> Tensor | None:
    """Return normalised training images without their labels, where there are images."""
    if data.data is None:
        return None
    images = data.open(output, "train", spec_of(network), reading)
    return images.sample(count, seed=0).inputs()


def _say(output: Output, point: SweepPoint) -> None:
    from prunekit.report import numbers

    if point.result is None:
        output.warn(f"{point.label} {point.ratio:g}: {point.error}")
    else:
        result = point.result
        accuracy = f"accuracy {numbers.percent(result.accuracy)}, " if result.accuracy is not None else ""
        output.note(f"{point.label} {point.ratio:g}: {accuracy}{result.params:,} parameters, {result.macs:,} MACs")


def _report(
    output: Output,
    target: Path,
    base: EvalResult,
    points: list[SweepPoint],
    sweep: SweepOptions,
    facts: dict[str, Any],
) -> None:
    from prunekit.report.pages import sweeping

    title = f"{base.model}: methods over ratios"
    if sweep.html is not None:
        write_report(sweep.html, sweeping.sweep_page(title, base, points), force=sweep.force)
    if sweep.picture is not None:
        from prunekit.report.pictures import png

        png.draw(sweeping.sweep_charts(base, points), Path(sweep.picture), title=title, force=sweep.force)
    if output.json:
        output.document(facts)
        return
    sweeping.show_sweep(output, base, points, sweep.format)
    output.note(f"the points are in {target}")


COMMAND = Command(
    run,
    (
        "prunekit sweep model.pt --data digits --picture sweep.png",
        "prunekit sweep model.pt --data digits --ratios 0.1:0.9:0.2 --method slim --method merge",
        "prunekit sweep model.pt --data digits --method merge:restore=none --method merge:restore=paper --html s.html",
        "prunekit sweep model.pt --data digits --ratios 0.45,0.55 --resume --format csv",
    ),
    {"sweep": "Sweep", "data": DATA, "options": "Measuring", "reading": READING},
)
