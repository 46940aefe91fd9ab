"""`train`: the entry point of training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.data import Examples, ImageSet
from prunekit.devices import check_types, check_whole, device_of, forked_generators, lay_channels_last
from prunekit.errors import TrainingError, counted
from prunekit.metric import ACCURACY, Metric
from prunekit.spec import remember_classes
from prunekit.tasks.base import Task
from prunekit.tasks.calls import is_out_of_memory
from prunekit.tasks.nests import floating_type
from prunekit.tasks.sets import fitted_to, inputs_of, task_of
from prunekit.training.config import TrainConfig
from prunekit.training.events import EpochEvent, Event, Scored, Sink
from prunekit.training.forward import check_fit
from prunekit.training.learner import Learner
from prunekit.training.loader import Feed
from prunekit.training.objective import Objective
from prunekit.training.penalty import inner_gammas
from prunekit.training.run import Run
from prunekit.training.signals import StopSignals
from prunekit.training.state import State, identity
from prunekit.training.synced_norm import synchronised
from prunekit.training.world import World, join


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the trained model, an `EpochEvent` for every epoch, and the seconds since the (last) start.

    Where the best weights are kept, `start` and `kept` say how good the network was at first and is now.

    Examples:
        >>> import prunekit as pk
        >>> train_set, val_set = (pk.open_data("digits", split) for split in ("train", "val"))
        >>> config = pk.TrainConfig(epochs=1, device="cpu")
        >>> done = pk.train(pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"}), config, train_set, val_set)
        >>> len(done.history), done.accuracy == done.history[-1].val_accuracy
        (1, True)
    """

    model: nn.Module
    history: tuple[EpochEvent, ...]
    seconds: float
    start: Scored | None = None
    kept: Scored | None = None

    @property
    def metric(self) -> Metric:
        """The score that counts."""
        return self.history[-1].metric

    @property
    def score(self) -> float | None:
        """Validation score of the weights that were kept."""
        return self.kept.score if self.kept else self.history[-1].val_score

    @property
    def accuracy(self) -> float | None:
        """Validation accuracy, 0 to 1, of the weights that were kept; None where another score counts."""
        return self.score if self.metric == ACCURACY else None

    @property
    def loss(self) -> float | None:
        """Validation loss of the weights that were kept."""
        return self.kept.loss if self.kept else self.history[-1].val_loss

    def step(self, config: TrainConfig) -> dict[str, Any]:
        """This run with the settings `config` as a step in the history of a network, JSON-ready.

        Where the best weights were kept, `kept` has their `epoch` (0: those before the run) and `score`, and `start`,
        the score before; all on the validation examples. `accuracy` repeats it where that is the score that counts.
        """
        metric = self.metric
        step = {"method": "train", "settings": config.settings(), "metric": metric.to_json(), "score": self.score}
        step["accuracy"] = self.accuracy
        if self.kept and self.start:
            kept = {"epoch": self.kept.epoch, "score": self.kept.score, "start": self.start.score}
            accuracy = {"accuracy": self.kept.score} if metric == ACCURACY else {}
            step["kept"] = {**kept, **accuracy, "epochs": config.epochs, "metric": metric.to_json()}
        return step


def train(
    model: nn.Module,
    config: TrainConfig,
    train_set: Examples,
    val_set: Examples | None = None,
    *,
    teacher: nn.Module | None = None,
    penalised: Sequence[str] | None = None,
    state_path: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    extra: Mapping[str, Any] | None = None,
    objective: Callable[[nn.Module, TrainConfig, nn.Module | None, Task], Objective] = Objective.of,
    on_event: Sink | None = None,
    enough: Callable[[Event], bool] | None = None,
) -> TrainResult:
    """Train `model` **in place**; it keeps its device, memory layout and train/eval modes.

    Labels are matched with the class names that the model remembers; one that remembers none takes those of
    `train_set`, which `save` then stores.

    On one CPU process a resumed run ends with the same weights, bit for bit, as if it had never stopped (a layer that
    draws from another generator than torch's is not covered). Under torchrun every process calls this; the batch is
    divided among them, and the first writes and reports.

    Args:
        model: A network.
        config: The settings; an open batch is chosen by the number of examples (`TrainConfig.suited_to`).
        train_set: The examples to train on: labelled images, or those that a task has opened.
        val_set: Examples to validate on after every epoch. With `config.keep` "best" the model is left with the weights
            that did best on them, of those after each epoch and those that it came with.
        teacher: A network to distil from.
        penalised: Names of the parameters under the L1 penalty; by default batch-norm weights, as
            `config.sparsity_scope` says.
        state_path: The file for the state of the run.
        resume: Go on from the state at `state_path`.
        force: Overwrite a state that exists.
        extra: JSON that is kept in the state and must agree on resuming.
        objective: Makes the loss that is minimised, from the model, the settings, the teacher and the task.
        on_event: Called with the events of `prunekit.training.events`.
        enough: Called with the same events, in one process alone; True ends the run with the step at hand.

    Returns:
        The trained model and the figures of every epoch.

    Raises:
        InputError: The settings or the data are unusable.
        TrainingError: The run cannot start, resume or go on. Where the best weights are kept, the model has them.
        Interrupted: SIGINT or SIGTERM stopped the run; its state is saved. The same holds.

    Examples:
        >>> import prunekit as pk
        >>> digits = pk.open_data("digits", "train")
        >>> model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
        >>> done = pk.train(model, pk.TrainConfig(epochs=2, lr=0.05, sparsity=1e-3, device="cpu"), digits)
        >>> done.model is model, done.history[1].loss < done.history[0].loss
        (True, True)
    """
    config.check()
    config = config.suited_to(len(train_set))
    train_set = fitted_to(model, train_set)
    val_set = None if val_set is None else fitted_to(model, val_set)
    began = time.monotonic()
    path = None if state_path is None else Path(state_path)
    world = join(config.device)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        stack.enter_context(_enough_memory(config))
        stack.enter_context(placed([model, teacher], config, world))
        stack.enter_context(_quiet(world))
        check_fit(model, train_set, val_set, teacher)
        if penalised is None and config.sparsity and config.sparsity_scope == "inner":
            penalised = inner_gammas(model, inputs_of(train_set, floating_type(model)))
        names = None if penalised is None else list(penalised)
        settings = {**config.settings(), **identity(model, train_set, val_set, teacher)}
        settings |= {"processes": world.size, "penalised": names, "extra": dict(extra or {})}
        aim = objective(model, config, teacher, task_of(train_set))
        stack.callback(aim.close)
        learner = Learner(model, config, world, aim, penalised)
        feed = Feed(train_set, config, world, learner.dtype)
        state = _state(settings, learner, path, world, resume=resume, force=force)
        with synchronised(model) if config.sync_bn and world.size > 1 else contextlib.nullcontext():
            Run(learner, feed, val_set, config, world, stop, state, path, on_event, enough).go()
    if isinstance(train_set, ImageSet):
        remember_classes(model, train_set.classes)
    history = tuple(EpochEvent.from_json(event) for event in state.history)
    start, kept = (None if scored is None else Scored(**scored) for scored in (state.start, state.best))
    return TrainResult(model, history, time.monotonic() - began, start, kept)


def _state(
    settings: dict[str, Any], learner: Learner, path: Path | None, world: World, *, resume: bool, force: bool
) -> State:
    if not resume:
        if path is not None and path.exists() and world.is_main and not force:
            raise TrainingError(f"{path} exists", hint="--resume goes on with it, --force starts anew")
        return State(settings)
    if path is None:
        raise TrainingError("no state to resume from was named")
    state = State.load(path)
    state.must_agree(settings, path)
    learner.restore(state.tensors)
    state.tensors = {}
    return state


@contextlib.contextmanager
def placed(models: Sequence[nn.Module | None], config: TrainConfig, world: World) -> Iterator[None]:
    """Put the models in eval mode, on the device and in the layout of the run; restore them at the end."""
    with contextlib.ExitStack() as stack:
        for model in models:
            if model is not None:
                check_whole(model)
                check_types(model, world.device)
                stack.callback(_put_back, model, device_of(model), {m: m.training for m in model.modules()})
                model.to(world.device).eval()
                if config.channels_last:
                    lay_channels_last(model)
        yield


def _put_back(model: nn.Module, device: torch.device, modes: dict[nn.Module, bool]) -> None:
    model.to(memory_format=torch.contiguous_format)
    model.to(device)
    for module, mode in modes.items():
        module.training = mode


@contextlib.contextmanager
def _quiet(world: World) -> Iterator[None]:
    """Restore the caller's random generators and cuDNN settings at the end."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = world.device.type == "cuda" or benchmark
    try:
        with forked_generators(world.device):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


@contextlib.contextmanager
def _enough_memory(config: TrainConfig) -> Iterator[None]:
    """Explain what to do where memory runs out inside."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
        raise TrainingError(
            f"out of memory with batches of {counted(config.batch, 'image')}{parts}",
            hint=f"--accumulate {2 * config.accumulate} computes the same in less memory, or lower --batch-size",
        ) from error
