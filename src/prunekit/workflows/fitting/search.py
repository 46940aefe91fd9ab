"""The smallest network that meets a goal: candidates are pruned and restored, and compared with the original.

Several ways are tried at one size; the one that loses least is then taken to the smallest size that the goal allows.
In the time that is left after that, still smaller ones are tuned. The held-out images decide and serve nothing else: no
candidate is restored or tuned with them. Whether one meets the goal is told by the paired bound of
`prunekit.evaluation.paired`, so that luck on few images is no success.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from prunekit import api
from prunekit.data import Examples, ImageSet
from prunekit.devices import device_of
from prunekit.errors import InputError, Interrupted, PrunekitError
from prunekit.evaluation.drops import check_parts, drop_between, measured
from prunekit.evaluation.paired import images_needed
from prunekit.nn.gated import gated_layers
from prunekit.restoration.images import Images, LabelledImages
from prunekit.surgery import Graph
from prunekit.training.events import Sink
from prunekit.workflows.calibration import example_for
from prunekit.workflows.fitting.sizes import FIRST, next_share
from prunekit.workflows.fitting.trials import Fitted, Trial, smallest
from prunekit.workflows.fitting.tuned import TimeIsUpError, Tuner
from prunekit.workflows.fitting.tuning import Pace, Tuning, next_tuning
from prunekit.workflows.goals import DropGoal
from prunekit.workflows.sweeps.making import Material
from prunekit.workflows.sweeps.points import Variant

WAYS = (Variant("merge", {"widths": "measured"}), Variant("slim"))
"""The ways that are tried where none is named."""

OnTrial = Callable[[Trial, nn.Module | None], None]


def fit(
    model: nn.Module,
    held_out: Examples,
    goal: DropGoal,
    *,
    images: Images | None = None,
    train_set: Examples | None = None,
    calibration: int = 1000,
    ways: Sequence[Variant] = WAYS,
    seconds: float | None = None,
    seed: int = 0,
    known: Iterable[Trial] = (),
    kept: nn.Module | None = None,
    on_trial: OnTrial | None = None,
    on_event: Sink | None = None,
) -> Fitted:
    """Search the smallest network, by its MACs, that loses no more accuracy than the goal allows.

    Args:
        model: A network; it stays as it is.
        held_out: Labelled images to decide by, or the examples that a task has opened. The network must not have been
            trained on them: it knows by heart what it was trained on, and loses less there than elsewhere.
        goal: How much accuracy may go.
        images: Unlabelled, normalised images `(N, C, H, W)` to restore from, none of them held out.
        train_set: Labelled images, none of them held out: without `images` those to restore from are drawn from them,
            and with `seconds` smaller networks are tuned on them in the time that is left.
        calibration: How many images are drawn to restore from.
        ways: Methods with their settings that are tried.
        seconds: How long the search may take. It ends no earlier than there is something to show.
        seed: Of the choice of images to restore from.
        known: Trials of an earlier search with the same arguments, which are not repeated.
        kept: The smallest network of that search that meets the goal.
        on_trial: Called after each new trial, with the network where it is the smallest so far that meets the goal.
        on_event: Called with the events of each tuning.

    Returns:
        The network and how it was found.

    Raises:
        InputError: Too few held-out images for such a drop, gates in the network, or no candidate meets the goal.
        Interrupted: A signal stopped a tuning.

    Examples:
        >>> import prunekit as pk
        >>> model, held_out = pk.load("prunekit:vgg_digits").eval(), pk.open_data("digits", "test")
        >>> images, _ = next(pk.open_data("digits", "train").batches(100))
        >>> found = pk.fit(model, held_out, pk.DropGoal.parse("10%"), images=images)
        >>> found.trial.drop.at_most(0.95) <= 0.1
        True
    """
    check_goal(goal, held_out)
    if any(gated_layers(model)):
        raise InputError(
            "a network with gates cannot be fitted: they decide for each image what is computed",
            hint="fit the network without gates, and train gates then",
        )
    material = Material(model, images, train_set, calibration=calibration)
    search = _Search(material, held_out, goal, seed, seconds, on_trial)
    search.recall(known, kept, ways)
    way = search.smallest_restored(ways)
    if seconds is not None and train_set is not None and not search.over:
        search.tune(way, Tuner.of(model, train_set, str(device_of(model)), on_event))
    return search.result()


def candidate(
    model: nn.Module,
    held_out: Examples,
    goal: DropGoal,
    way: Variant,
    *,
    train_set: Examples,
    calibration: int,
    seed: int,
    tuned: bool,
) -> tuple[Trial, float | None]:
    """Return the first trial of a search, and where it would be `tuned` how long an epoch takes, in seconds."""
    check_goal(goal, held_out)
    search = _Search(Material(model, None, train_set, calibration=calibration), held_out, goal, seed, None, None)
    search.restored(way, FIRST)
    epoch = Tuner.of(model, train_set, str(device_of(model))).seconds_of_an_epoch(model) if tuned else None
    return search.trials[0], epoch


def check_goal(goal: DropGoal, held_out: Examples) -> None:
    """Raise `InputError` where so many held-out images cannot show that a goal is met, whatever the network."""
    images = len(held_out)
    if not isinstance(held_out, ImageSet):
        check_parts(images, held_out.noun)
        return
    needed = images_needed(goal.drop, goal.confidence)
    if images < needed:
        raise InputError(
            f"a drop of at most {goal.drop:.2%} cannot be shown with confidence {goal.confidence:g} on {images} images",
            hint=f"at least {needed} held-out images are needed, or a larger drop, or a lower confidence",
        )


class _Search:
    """Trials so far, and the smallest network among them that meets the goal."""

    def __init__(
        self,
        material: Material,
        held_out: Examples,
        goal: DropGoal,
        seed: int,
        seconds: float | None,
        on_trial: OnTrial | None,
    ) -> None:
        self._end = None if seconds is None else time.perf_counter() + seconds
        self._material, self._held_out, self._goal, self._seed = material, held_out, goal, seed
        self._on_trial = on_trial
        started = time.perf_counter()
        self._original = measured(material.model, held_out, "original")
        self._scoring = time.perf_counter() - started
        self._example = example_for(held_out)
        if isinstance(held_out, ImageSet):
            self._example = (torch.zeros(1, *held_out.input_spec.shape),)
        self._before = api.inspect(material.model, self._example).cost
        self._images: dict[str, Images | LabelledImages | None] = {}
        self._graphs: dict[str, Graph] = {}  # traced once, and what is measured for one size serves the others
        self._best: tuple[nn.Module, api.Pruned | None] | None = None
        self.trials: list[Trial] = []

    def recall(self, known: Iterable[Trial], kept: nn.Module | None, ways: Sequence[Variant]) -> None:
        """Take over the trials of an earlier search, and its smallest network.

        Without the network it is made again; tuned ones, which take longer, are as if they had not been tried.
        """
        labels = {way.label for way in ways}
        lasting = [trial for trial in known if kept is not None or not (trial.epochs and trial.met)]
        self.trials = [trial for trial in lasting if trial.way in labels]
        lost = smallest(self.trials)
        if kept is not None:
            self._best = kept, None
        elif lost is not None:
            self.trials.remove(lost)
            self.restored(next(way for way in ways if way.label == lost.way), lost.share)

    @property
    def over(self) -> bool:
        """True once something is found and the time does not allow another trial."""
        if self._end is None or self._best is None:
            return False
        longest = max((trial.seconds for trial in self.trials if not trial.epochs), default=0.0)
        return time.perf_counter() + longest > self._end

    def smallest_restored(self, ways: Sequence[Variant]) -> Variant:
        """Compare the ways at one size and take the best of them to the smallest; return it.

        Raises:
            InputError: No way makes a network.
        """
        found: list[tuple[Trial, Variant]] = []
        for way in ways:
            if not found or not self.over:
                found.append((self.restored(way, FIRST), way))
        able = [(trial.bound, place) for place, (trial, _) in enumerate(found) if trial.bound is not None]
        if not able:
            reasons = "; ".join(f"{trial.way}: {trial.error}" for trial, _ in found)
            raise InputError(f"no way of pruning fits this network: {reasons}")
        best = found[min(able)[1]][1]
        while not self.over and (share := next_share(self._of(best), self._goal)) is not None:
            self.restored(best, share)
        return best

    def tune(self, way: Variant, tuner: Tuner) -> None:
        """Tune smaller networks as long as time allows."""
        assert self._end is not None
        typical = max(trial.seconds for trial in self._of(way) if not trial.epochs)
        pace: Pace | None = None
        while typical < self._end - time.perf_counter():
            pace = pace or Pace(tuner.seconds_of_an_epoch(self._material.model), typical)
            plan = next_tuning(self._of(way), self._goal, self._end - time.perf_counter(), pace)
            if plan is None:
                return
            trial = self._tuned(way, plan, tuner)
            self._keep(*trial)
            if trial[0].error is None:
                pace = pace.after(trial[0].seconds, plan.epochs)

    def result(self) -> Fitted:
        """Return what was found.

        Raises:
            InputError: Nothing meets the goal.
        """
        trial = smallest(self.trials)
        if self._best is None or trial is None:
            raise self._unmet()
        model, pruned = self._best
        return Fitted(model, self._goal, trial, tuple(self.trials), self._before, self._original.result, pruned)

    def _of(self, way: Variant) -> list[Trial]:
        return [trial for trial in self.trials if trial.way == way.label]

    def restored(self, way: Variant, share: float) -> Trial:
        """Prune to a share of the MACs, restore and compare; or recall that from an earlier search."""
        share = round(share, 3)
        recalled = next((trial for trial in self.trials if trial.key == (way.label, share, 0)), None)
        if recalled is not None:
            return recalled
        started = time.perf_counter()
        try:
            pruned = self._pruned(way, share)
        except PrunekitError as refused:
            seconds = time.perf_counter() - started
            trial = Trial(way.label, share, None, None, None, False, seconds, error=refused.message)
            return self._keep(trial, None)
        return self._keep(self._scored(way, share, pruned, 0, started), pruned)

    def _tuned(self, way: Variant, plan: Tuning, tuner: Tuner) -> tuple[Trial, api.Pruned | None]:
        assert self._end is not None
        started = time.perf_counter()
        try:
            pruned = self._pruned(way, plan.share)
            tuner.tune(pruned.model, plan.epochs, self._end - self._scoring)
        except Interrupted:
            raise
        except (PrunekitError, TimeIsUpError) as ended:
            reason = ended.message if isinstance(ended, PrunekitError) else "the time was over before it was tuned"
            seconds = time.perf_counter() - started
            refused = Trial(way.label, plan.share, None, None, None, False, seconds, plan.epochs, reason)
            return refused, None
        return self._scored(way, plan.share, pruned, plan.epochs, started), pruned

    def _pruned(self, way: Variant, share: float) -> api.Pruned:
        config = api.make_config(way.method, **{**way.settings, "target_macs": f"{share:.1%}"})
        if way.method not in self._images:
            self._images[way.method] = self._material.images_for(way.method, self._seed)
        images = self._images[way.method]
        graph = self._graphs.get(way.method)
        pruned = api.prune(way.method, self._material.model, self._example, config, images=images, graph=graph)
        self._graphs[way.method] = pruned.graph
        return pruned

    def _scored(self, way: Variant, share: float, pruned: api.Pruned, epochs: int, started: float) -> Trial:
        found = measured(pruned.model, self._held_out, f"{way.label} at {share:.0%}")
        drop = drop_between(self._original, found)
        bound = drop.at_most(self._goal.confidence)
        seconds, met = time.perf_counter() - started, bound <= self._goal.drop
        return Trial(way.label, share, pruned.after, drop, bound, met, seconds, epochs)

    def _keep(self, trial: Trial, pruned: api.Pruned | None) -> Trial:
        """Add a new trial, and keep its network where it is the smallest that meets the goal."""
        self.trials.append(trial)
        better = pruned if smallest(self.trials) is trial else None
        if better is not None:
            self._best = better.model, better
        if self._on_trial:
            self._on_trial(trial, better.model if better is not None else None)
        return trial

    def _unmet(self) -> InputError:
        scored = [trial for trial in self.trials if trial.bound is not None]
        nearest = min(scored, key=lambda trial: trial.bound or 0.0)
        assert nearest.drop is not None
        assert nearest.bound is not None
        return InputError(
            f"no network was found that loses at most {self._goal.drop:.2%}: the nearest, {nearest.label}, loses "
            f"{nearest.drop.share:.2%} of {nearest.drop.images} held-out {self._held_out.noun}s, which shows a loss of "
            f"at most {nearest.bound:.2%}",
            hint=f"allow {math.ceil(1000 * nearest.bound) / 10:g}%, name more held-out images, or give time for tuning",
        )
