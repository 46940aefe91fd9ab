"""Iterative pruning: prune, restore and tune in passes (Liu et al., "Network Slimming", ICCV 2017, section 3.3).

It works for every method. Several passes approach one target by equal factors, so each removes the same share of what
the one before has left. Finished steps are kept in a folder until the end: an interrupted run resumes from the last
finished step, and within a tuning from its last saved state.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from prunekit import api
from prunekit.api.latency import present_latency
from prunekit.checkpoint import load, save
from prunekit.data import Examples
from prunekit.devices import CPU, device_of, forked_generators, seed_generators
from prunekit.errors import InputError, TrainingError
from prunekit.evaluation.score import Score, scored
from prunekit.files.writing import atomic_write
from prunekit.methods.base import Config
from prunekit.methods.budget import check_budget, read_budget
from prunekit.methods.goal import latency_within
from prunekit.metric import ACCURACY, Metric
from prunekit.restoration.images import Images, LabelledImages
from prunekit.spec import origin_of, remember
from prunekit.surgery import Cost
from prunekit.surgery.graph.groups import frozen_by_reason
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import Sink
from prunekit.training.fine_tuning import cut_since_training, suited
from prunekit.training.world import is_main_process, process_count
from prunekit.workflows.calibration import example_for


@dataclass(frozen=True)
class PassResult:
    """One pass: `score_pruned` right after surgery, `score_tuned` after tuning, on the scoring examples, by `metric`.

    `widths` are the output channels of every convolution and linear layer after the pass; `plan`, `frozen` and
    `verify` (`difference`, `seconds`) are those of its surgery, as JSON. `tuning` are the settings that it was tuned
    with, and `kept` which weights were kept (see `TrainResult.step`), None where that was not asked.
    """

    number: int
    before: Cost
    after: Cost
    score_pruned: float
    score_tuned: float
    metric: Metric
    widths: dict[str, int]
    plan: dict[str, Any]
    frozen: dict[str, list[str]]
    verify: dict[str, float]
    tuning: dict[str, Any]
    kept: dict[str, Any] | None

    @property
    def notes(self) -> dict[str, Any]:
        """The notes of the method in its plan."""
        notes: dict[str, Any] = self.plan["notes"]
        return notes

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; of classification, the scores as accuracies as well."""
        costs = {"before": self.before.to_json(), "after": self.after.to_json()}
        accuracies = {"accuracy_pruned": self.score_pruned, "accuracy_tuned": self.score_tuned}
        known = accuracies if self.metric == ACCURACY else {}
        return {**vars(self), **costs, "metric": self.metric.to_json(), **known}


@dataclass(frozen=True)
class PassImages:
    """Examples of a run: to tune on, to validate on, to score passes with, and those that the method reads."""

    train: Examples
    val: Examples | None
    score: Examples
    calibration: Images | LabelledImages | None = None


@dataclass(frozen=True)
class PassSchedule:
    """The number of passes, and the tuning after each. The L1 penalty is left out of the last tuning.

    With `scratch` each tuning starts from new random weights in the pruned shape: the control of Liu et al.,
    "Rethinking the Value of Network Pruning" (ICLR 2019).
    """

    tuning: TrainConfig
    iterations: int = 1
    teacher: nn.Module | None = None
    scratch: bool = False

    def tuning_of(self, number: int) -> TrainConfig:
        """Return the tuning of pass `number`, counted from 1: only a network that is pruned again is made sparse.

        From scratch there are no first weights that would be worth keeping.
        """
        sparsity = self.tuning.sparsity if number < self.iterations else 0.0
        keep = self.tuning.keep or ("last" if self.scratch else None)
        return dataclasses.replace(self.tuning, sparsity=sparsity, keep=keep)


def run_passes(
    name: str,
    model: nn.Module,
    config: Config,
    images: PassImages,
    schedule: PassSchedule,
    folder: Path,
    *,
    resume: bool = False,
    on_event: Sink | None = None,
    on_pass: Callable[[PassResult], None] | None = None,
) -> tuple[nn.Module, list[PassResult]]:
    """Prune `model` with method `name` in passes to the one target of `config`, tuning after each.

    Args:
        name: The name of the method.
        model: The network; it stays unchanged.
        config: The settings of the method, with the target of the last pass.
        images: The images of the run.
        schedule: The number of passes, and their tuning.
        folder: Holds the steps done so far.
        resume: Go on from the steps in `folder`.
        on_event: Called with the events of each tuning.
        on_pass: Called after each pass.

    Returns:
        A new network, and the result of each pass.

    Raises:
        InputError: The settings or images cannot be used.
        TrainingError: `folder` holds another run's steps, or a tuning cannot go on.
        Interrupted: A signal stopped the run; the state is saved.
    """
    if schedule.iterations < 1:
        raise InputError(f"--iterations must be at least 1, not {schedule.iterations}")
    if config.target_latency is not None and process_count() > 1:
        raise InputError(
            "processes that measure a latency each come to networks of their own",
            hint="prune in one process, without --epochs, and tune the result with torchrun and prunekit train",
        )
    settings = {
        "method": name,
        "config": config.to_json(),
        "iterations": schedule.iterations,
        "scratch": schedule.scratch,
    }
    steps = _Steps(folder, settings, resume)
    results: list[PassResult] = []
    for number, budget in enumerate(_budgets(model, config, schedule.iterations, example_for(images.train)), start=1):
        pruned, facts = steps.pruned(number, partial(_prune, name, model, budget, images))
        model = _tune(pruned, number, images, schedule, steps, on_event)
        results.append(_result(number, facts, model, scored(model, images.score)))
        if on_pass:
            on_pass(results[-1])
    return model, results


def _tune(
    pruned: nn.Module, number: int, images: PassImages, schedule: PassSchedule, steps: _Steps, on_event: Sink | None
) -> nn.Module:
    """Return the network after the tuning of pass `number`, from the folder where that is done already."""
    tuned, state = steps.path(number, "tuned"), steps.path(number, "state")
    if tuned.exists():
        return load(tuned, trust_pickle=True)  # the run's own file, whatever code its architecture is
    asked, taught = schedule.tuning_of(number), schedule.teacher is not None
    config = suited(asked, len(images.train), cut_since_training(pruned), taught=taught and not schedule.scratch)
    if schedule.scratch:
        reinitialise(pruned, config.seed)
    done = train(
        pruned,
        config,
        images.train,
        images.val,
        teacher=schedule.teacher,
        state_path=state,
        resume=state.exists(),
        on_event=on_event,
    )
    origin = origin_of(pruned)
    if origin is not None:
        remember(pruned, origin.after(done.step(config)))
    if is_main_process():
        save(pruned, tuned, force=True)
    return pruned


def reinitialise(model: nn.Module, seed: int) -> None:
    """Reset every layer to new random weights, in place, as PyTorch initialises it."""
    device = device_of(model)
    model.cpu()  # whose numbers every machine draws alike
    with forked_generators(CPU):
        seed_generators(CPU, seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    model.to(device)


def _prune(name: str, model: nn.Module, config: Config, images: PassImages) -> tuple[nn.Module, dict[str, Any]]:
    x = example_for(images.train)
    pruned = api.prune(name, model, x, config=config, images=images.calibration)
    layers = api.inspect(pruned.model, x).cost.layers
    facts = {
        "before": pruned.before.to_json(),
        "after": pruned.after.to_json(),
        "score_pruned": scored(pruned.model, images.score).value,
        "widths": {layer.name: layer.channels for layer in layers if layer.channels},
        "plan": pruned.plan.to_json(),
        "frozen": frozen_by_reason(pruned.graph.groups),
        "verify": {"difference": pruned.difference, "seconds": pruned.verify_seconds},
    }
    return pruned.model, facts


def _result(number: int, facts: dict[str, Any], model: nn.Module, tuned: Score) -> PassResult:
    costs = {key: Cost(**facts[key]) for key in ("before", "after")}
    origin = origin_of(model)
    step = origin.history[-1] if origin else {}
    tuning, kept = step.get("settings", {}), step.get("kept")
    return PassResult(
        number=number,
        score_tuned=tuned.value,
        metric=tuned.metric,
        tuning=tuning,
        kept=kept,
        **{**facts, **costs},
    )


def _budgets(model: nn.Module, config: Config, passes: int, x: Any) -> Iterator[Config]:
    """Yield the settings of each pass: the remainder shrinks by the same factor each time, to the one target."""
    if passes == 1:
        yield config
        return

    def each(ratio: float) -> float:
        return 1.0 - float((1 - ratio) ** (1 / passes))

    if config.ratio_of:
        shares = {name: each(ratio) for name, ratio in config.ratio_of.items()}
        config = dataclasses.replace(config, ratio_of=shares)
    if check_budget(config) == "ratio_of":
        yield from [config] * passes
        return
    start = api.inspect(model, x).cost
    if config.target_latency is not None:
        yield from _latencies(model, config, passes)
        return
    budget = read_budget(config, start)
    for number in range(1, passes + 1):
        if budget.kind == "ratio":
            yield dataclasses.replace(config, ratio=each(budget.amount))
        elif budget.kind == "macs":
            amount = start.macs * (budget.amount / start.macs) ** (number / passes)
            yield dataclasses.replace(config, target_macs=amount)
        else:
            amount = start.params * (budget.amount / start.params) ** (number / passes)
            yield dataclasses.replace(config, target_params=amount)


def _latencies(model: nn.Module, config: Config, passes: int) -> Iterator[Config]:
    """Yield the settings of each pass where a latency is the target."""
    present = present_latency(model, config)
    goal = latency_within(config.target_latency, present)
    for number in range(1, passes + 1):
        yield dataclasses.replace(config, target_latency=f"{present * (goal / present) ** (number / passes)}ms")


class _Steps:
    """The finished steps of a run, one file each: `pass1.pruned.pt`, `pass1.tuned.pt`, ..."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        if not is_main_process():  # the first process reads and writes for all
            return
        header = folder / "run.json"
        if header.exists():
            self._agree(json.loads(header.read_text(encoding="utf-8")), settings, resume)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(header, settings)

    def _agree(self, before: dict[str, Any], now: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise TrainingError(f"{self.folder} holds an unfinished run", hint="--resume goes on with it")
        differing = [key for key in now if before.get(key) != now[key]]
        if differing:
            raise TrainingError(
                f"{self.folder} holds a run with another {' and '.join(differing)}",
                hint="resume with the same settings, or remove the folder",
            )

    def path(self, number: int, step: str) -> Path:
        """Return the file of a step of pass `number`."""
        return self.folder / (f"pass{number}.state" if step == "state" else f"pass{number}.{step}.pt")

    def pruned(
        self, number: int, prune: Callable[[], tuple[nn.Module, dict[str, Any]]]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the pruned network of pass `number` and its figures, from the folder or else made and saved there."""
        model_file, facts_file = self.path(number, "pruned"), self.folder / f"pass{number}.json"
        if model_file.exists() and facts_file.exists():
            return load(model_file, trust_pickle=True), json.loads(facts_file.read_text(encoding="utf-8"))
        model, facts = prune()
        if is_main_process():
            save(model, model_file, force=True)
            _write_json(facts_file, facts)
        return model, facts


def _write_json(path: Path, data: dict[str, Any]) -> None:
    content = (json.dumps(data) + "\n").encode()
    atomic_write(path, lambda stream: stream.write(content) and None, force=True)


def clear(folder: Path) -> None:
    """Remove the steps of a finished run, and the folder if nothing else is in it."""
    for path in folder.iterdir():
        if re.fullmatch(r"run\.json|pass\d+\.(json|state|pruned\.pt|tuned\.pt)", path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
