"""The loop of one training run: it trains, saves, stops and reports."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from prunekit.data import Examples
from prunekit.data.randomness import seed_of
from prunekit.devices import seed_generators
from prunekit.errors import Interrupted, TrainingError
from prunekit.metric import ACCURACY
from prunekit.training.config import TrainConfig
from prunekit.training.events import EpochEvent, Event, SaveEvent, Scored, Sink, StartEvent, StepEvent
from prunekit.training.learner import Learner
from prunekit.training.loader import Feed
from prunekit.training.schedule import learning_rate
from prunekit.training.signals import StopSignals
from prunekit.training.state import State
from prunekit.training.tally import Tally
from prunekit.training.world import World

_LAYERS = 2  # purpose of random numbers, beside the two of `loader`: dropout and the like


class Run:
    """The part of one process in a run, from the position of `state` to the end."""

    def __init__(
        self,
        learner: Learner,
        feed: Feed,
        val_set: Examples | None,
        config: TrainConfig,
        world: World,
        stop: StopSignals,
        state: State,
        path: Path | None,
        sink: Sink | None,
        enough: Callable[[Event], bool] | None = None,
    ) -> None:
        self._enough, self._ended = enough, False
        self._learner, self._feed, self._config = learner, feed, config
        self._val_set = None if val_set is None else val_set.resident(world.device)
        self._metric = learner.objective.task.metric
        self._world, self._stop, self._state, self._path, self._sink = world, stop, state, path, sink
        self._steps = config.epochs * feed.steps
        self._tally = Tally(world)
        self._tally.reset(state.tally)
        # Reading a figure waits for a GPU, and agreeing on one waits for the other processes.
        self._check_every = 1 if world.device.type == "cpu" else config.log_every
        self._saved = self._began = time.monotonic()
        self._first = self._number
        self._mark = (self._began, self._first)

    def go(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: A signal stopped the run.
            TrainingError: The loss is not finite.
        """
        self._start()
        try:
            while self._state.epoch < self._config.epochs and not self._ended:
                began = time.monotonic()
                self._train_epoch()
                self._end_epoch(began)
        except (Interrupted, TrainingError):
            self._learner.take_back()
            raise
        self._learner.finish()

    @property
    def _number(self) -> int:
        """The next step, counted from the beginning of the run."""
        return self._state.epoch * self._feed.steps + self._state.step

    @property
    def _lr(self) -> float:
        return learning_rate(self._config, self._number, self._steps, self._feed.steps)

    def _start(self) -> None:
        world, config = self._world, self._config
        images, penalised = len(self._feed.data), len(self._learner.penalty) if config.sparsity else 0
        place = (self._state.epoch, config.epochs, self._number, self._steps)
        device, batch = str(world.device), self._feed.batch
        self._emit(
            StartEvent(*place, device, world.size, images, penalised, batch, config.peak_lr, self._feed.data.noun)
        )
        if not self._number:
            self._learner.begin(self._feed.data)
            self._compare(0, *(self._validate() if self._keeps_best else (None, None)))
            self._save()

    def _train_epoch(self) -> None:
        state = self._state
        self._mark = (time.monotonic(), self._number)
        with contextlib.closing(self._feed.epoch(state.epoch, state.step)) as batches:
            while state.step < self._feed.steps:
                number, lr = self._number, self._lr
                seed_generators(self._world.device, seed_of(self._config.seed, number, _LAYERS, self._world.rank))
                self._learner.gradients(batches, number, self._tally)
                stop, save = self._agree(number)
                self._learner.update(lr)
                state.step += 1
                progress = state.epoch + state.step / self._feed.steps
                self._learner.objective.end_step(progress, self._config.epochs, self._world)
                if self._number % self._config.log_every == 0:
                    self._report(lr)
                if stop or save:
                    self._save()
                if stop:
                    self._interrupt()
                if self._ended:
                    return

    def _agree(self, number: int) -> tuple[bool, bool]:
        """Agree among all processes on whether to stop and to save after this step.

        Raises:
            TrainingError: The loss of a process is not finite.
        """
        config, world = self._config, self._world
        by_steps = config.save_every > 0 and (number + 1) % config.save_every == 0
        by_clock = world.is_main and time.monotonic() - self._saved >= config.save_seconds
        save, stop = by_steps or by_clock, self._stop.requested
        check = by_steps or (number + 1) % self._check_every == 0 or self._state.step + 1 == self._feed.steps
        if not check:
            return (stop, save) if world.size == 1 else (False, False)
        wishes = torch.tensor([stop, save, -self._tally.bad_step], device=world.device)
        agreed = world.largest(wishes).tolist()
        if agreed[2] > -math.inf:
            step = round(-agreed[2])
            raise self._no_number(f"the loss is no number at step {step}", step)
        return bool(agreed[0]), bool(agreed[1])

    def _end_epoch(self, began: float) -> None:
        state = self._state
        self._learner.synchronise()
        self._learner.objective.end_epoch(state.epoch, self._config.epochs, self._world)
        val_loss, val_score = self._validate()
        self._compare(state.epoch + 1, val_loss, val_score)
        loss, accuracy = self._tally.means()
        event = EpochEvent(
            epoch=state.epoch + 1,
            epochs=self._config.epochs,
            step=self._number,
            loss=loss,
            accuracy=accuracy,
            val_loss=val_loss,
            val_accuracy=val_score if self._metric == ACCURACY else None,
            lr=learning_rate(self._config, self._number - 1, self._steps, self._feed.steps),
            sparsity=self._learner.penalty.share_small(),
            seconds=time.monotonic() - began,
            figures=self._learner.objective.figures(),
            val_score=val_score,
            metric=self._metric,
        )
        state.history.append(dataclasses.asdict(event))
        state.epoch, state.step = state.epoch + 1, 0
        self._tally.reset()
        self._emit(event)
        self._save()

    def _validate(self) -> tuple[float, float] | tuple[None, None]:
        if self._val_set is None:
            return None, None
        alone = self._world.size == 1
        scored = self._learner.score(self._val_set, lambda: alone and self._stop.requested)
        if scored is None:
            self._save()
            self._interrupt()
        assert scored is not None
        return scored

    @property
    def _keeps_best(self) -> bool:
        return self._config.keep == "best" and self._val_set is not None

    def _compare(self, epoch: int, loss: float | None, score: float | None) -> None:
        """Set the weights aside where they are better than all before."""
        if not self._keeps_best or loss is None or score is None:
            return
        state, now = self._state, Scored(epoch, score, loss if math.isfinite(loss) else sys.float_info.max)
        if state.best is None or now.beats(Scored(**state.best), self._metric):
            state.best = dataclasses.asdict(now)
            self._learner.set_aside()
        state.start = state.start or state.best

    def _report(self, lr: float) -> None:
        loss, accuracy = self._tally.means()
        now, (then, before) = time.monotonic(), self._mark
        self._mark = (now, self._number)
        images = (self._number - before) * self._feed.batch
        pace = (now - self._began) / (self._number - self._first)
        self._emit(
            StepEvent(
                self._state.epoch + 1,
                self._config.epochs,
                self._number,
                self._steps,
                loss,
                accuracy,
                lr,
                self._learner.penalty.share_small(),
                images / max(now - then, 1e-9),
                (self._steps - self._number) * pace,
                self._learner.objective.figures(),
            )
        )

    def _save(self) -> None:
        if self._path is None:
            return
        self._learner.synchronise()
        self._state.tally = self._tally.totals()
        if not self._learner.finite:
            raise self._no_number(f"a weight is no number after step {self._number - 1}", self._number)
        if self._world.is_main:
            self._state.tensors = self._learner.tensors()
            self._state.save(self._path)
            self._state.tensors = {}
        self._world.wait()  # a process that ends before the file is written may take this one with it
        self._saved = time.monotonic()
        self._emit(SaveEvent(str(self._path), self._state.epoch, self._number))

    def _interrupt(self) -> None:
        place = f"interrupted in epoch {self._state.epoch + 1} after {self._number} of {self._steps} steps"
        hint = f"the state is in {self._path}: --resume goes on from there" if self._path else None
        raise Interrupted(place, hint=hint)

    def _no_number(self, what: str, steps: int) -> TrainingError:
        """Return the error for `what`, seen after `steps` steps."""
        if not steps:
            return TrainingError(
                "the network gives no numbers, or has a weight that is none, before the first step",
                hint="look for a division or a logarithm in it, for weights that were lost, and at the images' --std",
            )
        kept = f"; the last good state is in {self._path}" if self._path else ""
        return TrainingError(
            f"{what} (epoch {self._state.epoch + 1}, learning rate {self._lr:.3g}){kept}",
            hint="lower --lr or --sparsity, add --warmup or --clip, or train with --precision off",
        )

    def _emit(self, event: Event) -> None:
        if self._sink is not None and self._world.is_main:
            self._sink(event)
        self._ended = self._ended or (self._enough is not None and self._enough(event))
