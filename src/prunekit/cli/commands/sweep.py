"""`prunekit sweep`: methods over budgets, one table and picture; an interrupted sweep can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prunekit.cli import sweep_file
from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import DATA, READING, DataOptions, ModelArgument, ReadingOptions, option
from prunekit.cli.measuring import MeasureOptions, measure, open_images, warn_of_balance
from prunekit.cli.models import (
    STREAM,
    beside,
    check_inputs,
    check_report,
    describe_source,
    open_for,
    read_model,
    spec_of,
    write_report,
)
from prunekit.cli.sweep_arguments import Grid, PartOptions, SweepTuning, asked_for, check_grid, methods_option
from prunekit.errors import CheckFailed, InputError
from prunekit.report import numbers
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import nn

    from prunekit.data import Examples
    from prunekit.evaluation.score import EvalResult
    from prunekit.training.config import TrainConfig
    from prunekit.workflows.sweeps.points import SweepPoint
    from prunekit.workflows.sweeps.summary import Sweep

Methods = Annotated[
    list[str] | None,
    methods_option(
        "Methods, each perhaps with a way of restoring or other settings; manidp trains gates. By default all "
        "installed ones but baselines (l1-norm, random, taylor)."
    ),
]


@dataclass(frozen=True)
class SweepOptions:
    """Points of the sweep, and where they go."""

    ratios: str | None = option(
        metavar="R,...|FROM:TO:STEP", help="Shares of channels to remove (the default: 0.1:0.9:0.1)."
    )
    target_macs: str | None = option(metavar="AMOUNT,...", help="Or MACs to keep, such as 75%,50%,25% or 20M.")
    target_params: str | None = option(metavar="AMOUNT,...", help="Or parameters to keep, such as 75%,50%,25% or 2M.")
    target_latency: str | None = option(
        metavar="AMOUNT,...", help="Or times of a pass to come down to, such as 75%,50% of the present one or 5ms."
    )
    seeds: str | None = option(metavar="SEED,...", help="Make each network once with every seed (the default: 0).")
    within: float = option(1.0, metavar="POINTS", help="Points of the score that the recommended network may lose.")
    out: str | None = option(
        flag="--output,-o", metavar="FILE", help="File for the points, as JSON; by default beside the model."
    )
    resume: bool = option(
        False, help="Go on with the points of that file; other budgets, methods and seeds may be asked for."
    )
    force: bool = option(False, help="Replace files that exist.")
    calibration: int = option(1000, metavar="COUNT", help="Training images to restore from, without labels.")
    format: str = option("table", choices=("table", "csv", "markdown"), help="Format of the result on standard output.")
    picture: str | None = option(metavar="FILE", help="Draw accuracy against the budgets and MACs there.")
    html: str | None = option(metavar="FILE", help="Write one self-contained page there.")


def run(
    output: Output,
    model: ModelArgument,
    *,
    methods: Methods = None,
    sweep: SweepOptions,
    part: PartOptions,
    data: DataOptions,
    tuning: SweepTuning,
    options: MeasureOptions,
    reading: ReadingOptions,
) -> None:
    """Measure the model, then every method at every budget that is not yet known."""
    options.check()
    check_inputs(model, data, reading)
    target = _target(model, sweep, data)
    stored = sweep_file.read(target) if sweep.resume else sweep_file.Stored()
    grid, config = asked_for(output, methods, sweep, part, stored), tuning.settled(options.device)
    check_grid(grid, data, config)
    if not sweep.resume:
        sweep_file.must_be_new(target, force=sweep.force)
    network, _ = read_model(model, reading, options.device)
    settings = _settings(network, sweep, data, options, grid, config)
    sweep_file.must_agree(target, stored, settings)
    images = open_images(output, network, data, options, reading)
    base = stored.base or measure(output, network, describe_source(model), images, options)
    warn_of_balance(output, base)
    facts = {"model": describe_source(model), **settings, "asked": grid.to_json()}
    job = _Job(output, target, facts, grid, config, base, images, data, options, sweep)
    done = job.view(_points(job, network, stored.points, reading))
    _report(job, done, job.store(done))
    if done.failed:
        raise CheckFailed(
            f"{len(done.failed)} of {numbers.counted(len(done.points), 'point')} have no figures",
            hint="their rows say why; --resume tries them again",
        )


@dataclass(frozen=True)
class _Job:
    """One call of the command, parsed and checked, with the network measured."""

    output: Output
    target: Path
    facts: dict[str, Any]
    grid: Grid
    tuning: TrainConfig | None
    base: EvalResult
    images: Examples | None
    data: DataOptions
    options: MeasureOptions
    sweep: SweepOptions

    def view(self, points: Sequence[SweepPoint]) -> Sweep:
        """Return the sweep as far as it is."""
        from prunekit.workflows.sweeps.summary import Sweep

        epochs = self.tuning.epochs if self.tuning else 0
        axis, within = self.grid.axis, self.sweep.within
        return Sweep(self.base, tuple(points), axis, self.data.named, self.options.split, epochs, within)

    def store(self, sweep: Sweep) -> dict[str, Any]:
        """Write the sweep to its file; return the document."""
        return sweep_file.write(self.target, self.facts, sweep)


def _settings(
    network: nn.Module,
    sweep: SweepOptions,
    data: DataOptions,
    options: MeasureOptions,
    grid: Grid,
    tuning: TrainConfig | None,
) -> dict[str, Any]:
    """Return what all points of one file have in common."""
    from prunekit.workflows.sweeps.points import fingerprint

    if not data.of_task:
        spec_of(network)
    return {
        "weights": fingerprint(network),
        "data": data.named,
        "split": options.split,
        "calibration": sweep.calibration,
        "axis": grid.axis,
        "tuning": tuning.settings() if tuning else None,
    }


def _points(
    job: _Job, network: nn.Module, known: Sequence[SweepPoint], reading: ReadingOptions
) -> Sequence[SweepPoint]:
    """Make and measure the points that are not known, and store each when it is done."""
    from prunekit.report.terminal.training import watching
    from prunekit.workflows.sweeps.running import sweep

    output, grid, data = job.output, job.grid, job.data
    job.store(job.view(known))

    def keep(points: Sequence[SweepPoint]) -> None:
        job.store(job.view(points))
        _say(output, points[-1], len(grid.seeds) > 1)

    return sweep(
        network,
        grid.variants,
        grid.budgets,
        lambda made, name: measure(output, made, name, job.images, job.options),
        axis=grid.axis,
        seeds=grid.seeds,
        train_set=open_for(output, network, data, "train", reading) if data.given else None,
        val_set=open_for(output, network, data, "val", reading) if job.tuning else None,
        calibration=job.sweep.calibration,
        tuning=job.tuning,
        known=known,
        on_point=keep,
        on_event=watching(output, "tuning"),
    )


def _target(source: str, sweep: SweepOptions, data: DataOptions) -> Path:
    """Return the file of the points, after checking that everything can be written."""
    if sweep.out == STREAM or (sweep.out is None and source == STREAM):
        raise InputError("a sweep keeps its points in a file", hint="name one with -o FILE")
    if sweep.calibration < 1:
        raise InputError(f"--calibration must be at least 1, not {sweep.calibration}")
    if not 0 <= sweep.within <= 100:
        raise InputError(f"--within must lie between 0 and 100 points, not {sweep.within:g}")
    check_report(sweep.html, force=sweep.force)
    check_report(sweep.picture, force=sweep.force)
    if sweep.picture is not None:
        from prunekit.report.pictures.png import check_picture

        check_picture(sweep.picture)
        if not data.given:
            raise InputError("a picture of accuracies needs images", hint="say which with --data")
    path = Path(sweep.out) if sweep.out is not None else beside(source, "sweep", ".json")
    check_report(str(path), force=True)
    return path


def _say(output: Output, point: SweepPoint, several: bool) -> None:
    from prunekit.workflows.sweeps.points import written

    name = f"{point.label} {written(point.budget[1])}" + (f", seed {point.seed}" if several else "")
    if point.result is None:
        output.warn(f"{name}: {point.error}")
        return
    result = point.result
    score = f"{result.metric.name} {numbers.score(result.metric, result.score)}, " if result.metric is not None else ""
    output.note(f"{name}: {score}{result.params:,} parameters, {result.macs:,} MACs")


def _report(job: _Job, done: Sweep, facts: dict[str, Any]) -> None:
    from prunekit.report.pages import sweeping
    from prunekit.report.terminal.sweeping import show_sweep

    title, asked = f"{Path(done.base.model).name}: {done.metric.name} against cost", job.sweep
    if asked.html is not None:
        write_report(asked.html, sweeping.sweep_page(title, done), force=asked.force)
    if asked.picture is not None and (charts := sweeping.sweep_charts(done)):
        from prunekit.report.pictures import png

        about = sweeping.sweep_about(done)
        png.draw(charts, Path(asked.picture), title=title, about=about, force=asked.force)
    if job.output.json:
        job.output.document(facts)
        return
    show_sweep(job.output, done, asked.format)
    job.output.note(f"the points are in {job.target}")


COMMAND = Command(
    run,
    (
        "prunekit sweep model.pt --data digits --picture sweep.png",
        "prunekit sweep model.pt --data digits --ratios 0.1:0.9:0.2 --methods slim,merge,random,l1-norm,taylor",
        "prunekit sweep model.pt --data digits --methods merge:none,merge:paper,merge:moments --html sweep.html",
        "prunekit sweep model.pt --data digits --target-macs 75%,50%,25% --epochs 3 --seeds 0,1,2",
        "prunekit sweep model.pt --data digits --target-macs 75%,50% --methods merge,manidp --epochs 10",
        "prunekit sweep model.pt --data digits --ratios 0.45,0.55 --resume --format csv",
    ),
    {"sweep": "Sweep", "data": DATA, "tuning": "Tuning (with --data)", "options": "Measuring", "reading": READING},
    {"distill": "--distill-share"},
)
