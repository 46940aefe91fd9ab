"""`prunekit fit`: say the goal, get the network; the best so far is always in its file."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prunekit.cli.fit_file import FitFile, must_be_new
from prunekit.cli.fitting import Fitting, GoalOptions, fit_images
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
from prunekit.cli.models import (
    STREAM,
    check_inputs,
    check_kind,
    check_report,
    describe_source,
    output_path,
    read_model,
    write_report,
)
from prunekit.cli.sweep_arguments import methods_option, read_variants
from prunekit.cli.times import read_seconds
from prunekit.errors import InputError
from prunekit.report import numbers
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from prunekit.workflows.fitting.outcome import Outcome
    from prunekit.workflows.sweeps.points import Variant

_SIZES = 4  # that the search tries after the ways, on average over curves of all shapes

Methods = Annotated[
    list[str] | None,
    methods_option(
        "Ways to compare, each perhaps with a way of restoring or other settings (the default: "
        "merge:widths=measured,slim)."
    ),
]


@dataclass(frozen=True)
class FitOptions:
    """How the search goes, and its pictures."""

    time: str | None = option(
        metavar="TIME", help="Time for all of it, such as 90s, 20m or 1h; what pruning leaves of it goes into tuning."
    )
    calibration: int = option(1000, metavar="COUNT", help="Training images to restore from, without labels.")
    device: str | None = device_option()
    resume: bool = option(False, help="Go on with an interrupted search: the same command, and this flag.")
    seed: int = option(0, help="Seed of the choice of images to restore from.")
    picture: str | None = option(metavar="FILE", help="Draw accuracy against MACs there.")
    html: str | None = option(metavar="FILE", help="Write one self-contained page there.")


def run(
    output: Output,
    model: ModelArgument,
    *,
    methods: Methods = None,
    goal: GoalOptions,
    search: FitOptions,
    where: OutputOptions,
    data: DataOptions,
    reading: ReadingOptions,
) -> None:
    """Search the smallest network that meets the goal, and show all that was tried."""
    started, wanted = time.perf_counter(), goal.goal()
    if wanted is None:
        raise InputError("no goal given", hint="for example --max-drop 1%: at most one point of accuracy lost")
    seconds = None if search.time is None else read_seconds(search.time)
    ways = _ways(methods)
    target = _target(model, where, search, output)
    check_inputs(model, data, reading, images_needed=True)
    network, _ = read_model(model, reading, search.device)
    check_kind(network, target)
    images = fit_images(output, network, data, reading)
    source, named, count = describe_source(model), str(data.named), search.calibration
    job = Fitting(output, network, source, named, images, wanted, ways, count, seconds, target, search.resume)
    job.seed, job.started = search.seed, started
    if where.dry_run:
        _rehearse(output, job)
    else:
        _report(output, search, where, target, job.run())


def _ways(methods: list[str] | None) -> tuple[Variant, ...]:
    from prunekit.workflows.fitting.search import WAYS
    from prunekit.workflows.sweeps.points import GATES

    ways = read_variants(methods) if methods else WAYS
    if any(way.method == GATES for way in ways):
        raise InputError(f"{GATES} trains gates, which a search by pruning cannot", hint="leave it out of --methods")
    return tuple(ways)


def _target(source: str, where: OutputOptions, search: FitOptions, output: Output) -> str:
    """Return the file of the network, after checking that everything can be written."""
    if where.out == STREAM:
        raise InputError("the best network so far is kept in a file", hint="name one with -o FILE")
    if search.calibration < 1:
        raise InputError(f"--calibration must be at least 1, not {search.calibration}")
    anywhere = dataclasses.replace(where, force=True, if_exists="replace")
    path = Path(output_path(source, anywhere, "fit", output))
    must_be_new(path, resume=search.resume or where.dry_run, force=where.force)
    going_on = search.resume and FitFile.path_of(path).exists()  # whose file may be replaced, no other
    target = output_path(source, anywhere if going_on else where, "fit", output)
    if not where.dry_run:
        check_report(target, force=True)
        check_report(search.html, force=where.force)
        check_report(search.picture, force=where.force)
    if search.picture is not None:
        from prunekit.report.pictures.png import check_picture

        check_picture(search.picture)
    return target


def _rehearse(output: Output, job: Fitting) -> None:
    """Say what would be tried and how long that takes, by one candidate."""
    from prunekit.report.terminal.fitting import say_trial
    from prunekit.workflows.fitting.search import candidate

    trial, epoch = candidate(
        job.network,
        job.images.held_out.decide,
        job.goal,
        job.ways[0],
        train_set=job.images.train,
        calibration=job.calibration,
        seed=job.seed,
        tuned=job.seconds is not None,
    )
    trials = len(job.ways) + _SIZES
    facts: dict[str, Any] = {"output": None, "methods": [way.label for way in job.ways], "goal": job.goal.to_json()}
    facts |= {"candidate": trial.to_json(), "trials": trials, "seconds": trials * trial.seconds, "epoch_seconds": epoch}
    if output.json:
        output.document(document("fit", facts))
        return
    say_trial(output, trial)
    named = " and ".join(way.label for way in job.ways)
    output.note(
        f"{named} would be compared at this size, and the best taken to the smallest: about "
        f"{numbers.counted(trials, 'trial')}, {numbers.duration(trials * trial.seconds)}"
    )
    if epoch is not None:
        output.note(f"what is left of the time would go into tuning; an epoch takes {numbers.duration(epoch)}")


def _report(output: Output, search: FitOptions, where: OutputOptions, target: str, found: Outcome) -> None:
    """Draw and show all that was tried; the network is in its file already."""
    from prunekit.report.pages import fitting
    from prunekit.report.terminal.fitting import show_fit

    title = f"{Path(found.model).name}: at most {numbers.counted_points(100 * found.fitted.goal.drop)} lost"
    if search.html is not None:
        write_report(search.html, fitting.fit_page(title, found), force=where.force)
    if search.picture is not None:
        from prunekit.report.pictures import png

        chart, about = fitting.fit_chart(found), fitting.fit_about(found)
        png.draw([chart], Path(search.picture), title=title, about=about, force=where.force)
    if output.json:
        output.document(document("fit", {"output": target, **found.to_json()}))
        return
    show_fit(output, found)
    output.data(target)


COMMAND = Command(
    run,
    (
        "prunekit fit model.pt --data digits --max-drop 3% -o small.pt",
        "prunekit fit model.pt --data photos --max-drop 0.5% --time 30m -o small.pt --picture fit.png --html fit.html",
        "prunekit fit model.pt --data digits --max-drop 3% --time 20m -o small.pt --resume",
        "prunekit fit model.pt --data digits --max-drop 3% --methods merge,merge:scope=all,slim --dry-run",
    ),
    {"goal": "Goal", "search": "Search", "where": "Output", "data": DATA, "reading": READING},
)
