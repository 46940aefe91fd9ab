"""The command of a pruning method, built from its plug-in's description."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.fitting import Fitting, GoalOptions, check_alone, fit_images
from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import DATA, READING, DataOptions, ModelArgument, OutputOptions, ReadingOptions
from prunekit.cli.healing import HEALING, HealOptions, healed
from prunekit.cli.models import (
    STREAM,
    check_inputs,
    check_kind,
    describe_source,
    output_path,
    read_model,
    spec_of,
    write_model,
)
from prunekit.cli.tuning import (
    TUNING,
    Job,
    PassOptions,
    Tuning,
    calibration_images,
    check,
    draw,
    images_to_heal_on,
    tune,
)
from prunekit.methods.budget import check_budget
from prunekit.metric import ACCURACY, Metric
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from prunekit.api import Pruned
    from prunekit.workflows.goals import DropGoal
    from prunekit.workflows.passes import PassResult


def command_for(name: str) -> Command:
    """Return the command of the method `name`: its `Config` becomes flags, its examples lead the help."""
    from prunekit.methods import registry

    method = registry.get(name)

    def run(
        output: Output,
        model: ModelArgument,
        config: Any,
        goal: GoalOptions,
        where: OutputOptions,
        data: DataOptions,
        passes: PassOptions,
        tuning: Tuning,
        healing: HealOptions,
        reading: ReadingOptions,
    ) -> None:
        target = output_path(model, where, name, output)
        check(data, tuning, passes, target, heals=healing.heal)
        wanted = goal.goal()
        healing.check(
            target,
            data=data.data is not None,
            tunes=tuning.epochs > 0,
            searches=wanted is not None,
            resume=passes.resume,
            force=where.force or where.dry_run,
        )
        check_inputs(model, data, reading, images_needed=wanted is not None)
        if wanted is None:
            check_budget(config)
        else:
            check_alone(config, tuning)
        network, _ = read_model(model, reading, tuning.device)
        check_kind(network, target)
        if not data.of_task:
            spec_of(network)
        job = Job(output, name, network, config, target, where, data, passes, tuning, reading, healing)
        if wanted is not None:
            _fit(job, model, wanted)
        elif tuning.epochs and not where.dry_run:
            _tune(job)
        else:
            _prune(job)

    # the generator of options reads the annotation, which is known only now
    run.__annotations__["config"] = method.Config
    sections = {"config": "Method", "goal": "Method", "where": "Output", "data": DATA, "passes": TUNING}
    sections |= {"tuning": TUNING, "healing": HEALING, "reading": READING}
    return Command(run, tuple(method.examples), sections, {"distill": "--distill-share"})


def _fit(job: Job, source: str, goal: DropGoal) -> None:
    """Search the smallest network of this method that meets the goal, and write it like any other."""
    from prunekit.report.terminal.fitting import show_fit
    from prunekit.workflows.sweeps.points import Variant

    images = fit_images(job.output, job.network, job.data, job.reading)
    fields = dataclasses.fields(job.config)
    settings = {item.name: value for item in fields if (value := getattr(job.config, item.name)) != item.default}
    way, count = Variant(job.name, settings), job.passes.calibration
    search = Fitting(job.output, job.network, describe_source(source), str(job.data.named), images, goal, (way,), count)
    found = search.run()
    assert found.fitted.pruned is not None
    if not job.output.json:
        show_fit(job.output, found)
    _finish(job, found.fitted.pruned, fit=found.to_json())


def _prune(job: Job) -> None:
    """Prune, verify, heal where that is asked for, write the artefact, and show the changes."""
    from prunekit import api
    from prunekit.workflows.calibration import example_for

    train_set = job.images("train") if job.data.of_task else None
    images, x = calibration_images(job, train_set), example_for(train_set)
    pruned = api.prune(job.name, job.network, x, config=job.config, images=images)
    if not job.healing.heal or job.where.dry_run:
        _finish(job, pruned)
        return
    from prunekit.report.terminal.healing import say_healed

    to_heal_on, device, resume = images_to_heal_on(job), job.tuning.device, job.passes.resume
    found = healed(job.healing, pruned.model, job.network, to_heal_on, job.target, device=device, resume=resume)
    _finish(job, dataclasses.replace(pruned, model=found.model), healing=found.to_json())
    say_healed(job.output, found)


def _finish(job: Job, pruned: Pruned, **more: Any) -> None:
    """Draw, write and show a surgery."""
    output, dry_run = job.output, job.where.dry_run
    if job.passes.pictures and not dry_run:
        draw(job.passes.pictures, job.network, pruned.model, dict(pruned.plan.notes))
    written = None if dry_run else write_model(pruned.model, job.target, output, force=job.where.force)
    if output.json:
        facts = {"output": written, "settings": job.config.to_json(), **_facts(pruned), **more}
        output.document(document(job.name, facts))
    else:
        from prunekit.report.terminal.pruning import report

        report(output, pruned, dry_run=dry_run)
        if written not in (None, STREAM):
            output.data(str(written))


def _tune(job: Job) -> None:
    """Prune and tune in passes, write the final network, and show each pass."""
    from prunekit.report.terminal.passes import report_passes
    from prunekit.workflows.passes import clear

    started, output = time.perf_counter(), job.output
    tuned, results, start = tune(job)
    if job.passes.pictures and output.first:
        from prunekit.report.pictures import png

        draw(job.passes.pictures, job.network, tuned, results[-1].notes)
        chart, about = png.passes_chart(results, start), f"test images of {job.data.named}"
        png.draw([chart], Path(job.passes.pictures) / "passes.png", about=about)
    written = write_model(tuned, job.target, output, force=job.where.force)
    if output.first:
        clear(job.steps)
    if output.json:
        facts = _pass_facts(results, start, time.perf_counter() - started)
        output.document(document(job.name, {"output": written, "settings": job.config.to_json(), **facts}))
    else:
        report_passes(output, results, start)
        output.data(written)


def _facts(pruned: Pruned) -> dict[str, Any]:
    """Return the facts of a finished surgery for programs."""
    from prunekit.surgery.graph.groups import frozen_by_reason

    return {
        "before": pruned.before.to_json(),
        "after": pruned.after.to_json(),
        "plan": pruned.plan.to_json(),
        "protected": list(pruned.plan.notes.get("protected", [])),
        "frozen": frozen_by_reason(pruned.graph.groups),
        "seconds": pruned.seconds,
        "verify": {"difference": pruned.difference, "seconds": pruned.verify_seconds},
    }


def _score_facts(metric: Metric, value: float) -> dict[str, float]:
    """Return a score as JSON, of classification as an accuracy as well."""
    return {"score": value, **({"accuracy": value} if metric == ACCURACY else {})}


def _pass_facts(results: list[PassResult], start: float, seconds: float) -> dict[str, Any]:
    """Return the same keys for a run of passes, with each pass; plan and proof are those of the last."""
    last = results[-1]
    return {
        "before": {**results[0].before.to_json(), **_score_facts(last.metric, start)},
        "after": {**last.after.to_json(), **_score_facts(last.metric, last.score_tuned)},
        "metric": last.metric.to_json(),
        "plan": last.plan,
        "protected": last.notes.get("protected", []),
        "frozen": last.frozen,
        "seconds": seconds,
        "verify": last.verify,
        "passes": [done.to_json() for done in results],
    }
