"""Searches for the smallest network that meets a goal, for `fit` and for methods with `--max-drop`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.fit_file import FitFile, Kept
from prunekit.cli.framework.options import DataOptions, ReadingOptions, Split, option
from prunekit.cli.models import open_for, write_model
from prunekit.cli.tuning import Tuning
from prunekit.errors import InputError, Interrupted
from prunekit.methods.base import Config
from prunekit.report import numbers
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import nn

    from prunekit.data import Examples
    from prunekit.workflows.fitting.holding_out import HeldOut
    from prunekit.workflows.fitting.outcome import Outcome
    from prunekit.workflows.fitting.trials import Fitted, Trial
    from prunekit.workflows.goals import DropGoal
    from prunekit.workflows.sweeps.points import Variant

BUDGETS = ("ratio", "target_macs", "target_params", "target_latency")
"""Settings of methods that say how much goes."""

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_FOR_SEARCHING = 0.95  # of the time; the rest is for scoring on the images that report


@dataclass(frozen=True)
class GoalOptions:
    """How much accuracy may go."""

    max_drop: str | None = option(
        metavar="POINTS", help="Search the smallest network that loses at most this, such as 1%, on images held out."
    )
    confidence: float = option(0.95, metavar="SHARE", help="How sure it must be that further images lose no more.")

    def goal(self) -> DropGoal | None:
        """Return the goal, checked; None where there is none.

        Raises:
            InputError: It makes no sense.
        """
        from prunekit.workflows.goals import DropGoal

        return None if self.max_drop is None else DropGoal.parse(self.max_drop, self.confidence)


def check_alone(config: Config, tuning: Tuning) -> None:
    """Raise `InputError` where something else says how much goes, or a tuning is asked for.

    Settings of a method that say how much goes are None where they are not given.
    """
    given = [name for name in BUDGETS if getattr(config, name, None) is not None]
    if given:
        said = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"--max-drop says how much goes, and so does {said}", hint="leave one of them out")
    if tuning.epochs:
        raise InputError(
            "--max-drop searches without tuning", hint="prunekit fit --time tunes as well; or leave --epochs out"
        )


@dataclass(frozen=True)
class FitImages:
    """The images of a search: for restoring and tuning, and those held out."""

    train: Examples
    held_out: HeldOut[Examples]


def fit_images(output: Output, network: nn.Module, data: DataOptions, reading: ReadingOptions) -> FitImages:
    """Open the images and hold some out; say which."""
    from prunekit.workflows.fitting.holding_out import hold_out

    train, val, test = (open_for(output, network, data, split, reading) for split in _SPLITS)
    held_out = hold_out(val, test)
    output.note(held_out.said)
    return FitImages(train, held_out)


@dataclass
class Fitting:
    """One search, parsed and checked, with its images.

    Attributes:
        output: Where it is told.
        network: The network; it stays as it is.
        source: What it is called.
        data: The images, as named.
        images: The same, opened.
        goal: How much accuracy may go.
        ways: What is tried.
        calibration: How many training images to restore from.
        seconds: How long it may take, from when it `started`; None for as long as restoring takes, and no tuning.
        target: The file of the network; None writes none.
        resume: Go on with an earlier search.
        seed: Of the choice of images to restore from.
    """

    output: Output
    network: nn.Module
    source: str
    data: str
    images: FitImages
    goal: DropGoal
    ways: Sequence[Variant]
    calibration: int
    seconds: float | None = None
    target: str | None = None
    resume: bool = False
    seed: int = 0
    started: float = field(default_factory=time.perf_counter)
    _trials: list[Trial] = field(default_factory=list)

    def run(self) -> Outcome:
        """Search, with the best network so far always in its file, and score it on the images that report.

        Raises:
            InputError: Nothing meets the goal, or the earlier search was another.
            Interrupted: A signal stopped it; what was found stays.
        """
        from prunekit.workflows.fitting.outcome import outcome

        file = self._file()
        kept = file.recall() if file and self.resume else Kept()
        if kept.trials:
            self.output.note(f"going on after {numbers.counted(len(kept.trials), 'trial')}")
        self._trials = list(kept.trials)
        try:
            fitted = self._search(kept, self._keeper(file, written=kept.model is not None))
        except (KeyboardInterrupt, Interrupted):
            raise self._stopped(file) from None
        except InputError:  # nothing meets the goal: this search has ended, too
            if file:
                file.remove()
            raise
        found = outcome(fitted, self.network, self.images.held_out, self.source, self.data)
        if file:
            file.remove()
        return found

    def _search(self, kept: Kept, keep: Callable[[Trial, nn.Module | None], None]) -> Fitted:
        from prunekit.report.terminal.training import watching
        from prunekit.workflows.fitting.search import fit

        return fit(
            self.network,
            self.images.held_out.decide,
            self.goal,
            train_set=self.images.train,
            calibration=self.calibration,
            ways=self.ways,
            seconds=self._left(),
            seed=self.seed,
            known=kept.trials,
            kept=kept.model,
            on_trial=keep,
            on_event=watching(self.output, "tuning"),
        )

    def _left(self) -> float | None:
        """Return the seconds that are left for searching; what was read and what will be scored need some, too."""
        if self.seconds is None:
            return None
        return max(0.0, _FOR_SEARCHING * self.seconds - (time.perf_counter() - self.started))

    def _keeper(self, file: FitFile | None, *, written: bool) -> Callable[[Trial, nn.Module | None], None]:
        """Return what writes each better network, then the trials, and tells of each."""
        from prunekit.report.terminal.fitting import say_trial

        def keep(trial: Trial, better: nn.Module | None) -> None:
            nonlocal written
            say_trial(self.output, trial)
            self._trials.append(trial)
            if file is None or not self.output.first:
                return
            if better is not None:
                write_model(better, str(file.target), self.output, force=True)
                written = True
            file.store(self._trials, written=written)

        return keep

    def _file(self) -> FitFile | None:
        from prunekit.workflows.sweeps.points import fingerprint

        if self.target is None:
            return None
        settings: dict[str, Any] = {
            "weights": fingerprint(self.network),
            "goal": self.goal.to_json(),
            "data": self.data,
            "images": [len(self.images.train), len(self.images.held_out.decide)],
            "methods": [way.label for way in self.ways],
            "calibration": self.calibration,
            "seed": self.seed,
        }
        return FitFile(Path(self.target), settings)

    def _stopped(self, file: FitFile | None) -> Interrupted:
        from prunekit.workflows.fitting.trials import smallest

        best = smallest(self._trials)
        if file is None:
            return Interrupted("interrupted; nothing was written")
        if best is None:
            return Interrupted("interrupted before anything met the goal", hint="--resume goes on")
        return Interrupted(f"interrupted; {file.target} has the smallest so far, {best.label}", hint="--resume goes on")
