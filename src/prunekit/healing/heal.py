"""`heal`: a pruned network learns from its original, without labels, on the few images that it was restored from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.data import ImageSet
from prunekit.errors import InputError, TrainingError
from prunekit.healing.config import HealConfig
from prunekit.healing.task import Task
from prunekit.healing.watch import Watch
from prunekit.restoration.images import Images
from prunekit.spec import origin_of, remember
from prunekit.training.entry import train
from prunekit.training.events import Sink
from prunekit.training.world import process_count


@dataclass(frozen=True)
class Healed:
    """A healed network: `heal` returns it.

    Attributes:
        model: The network, at its best on the held-out images; the one that was given is as it was.
        before: The share of held-out images that the pruned network answered with the same class as the original.
        after: The same of `model`.
        epochs: How many were planned.
        images: How many images it was healed on, and how many were held out.
        seconds: The time that all took.
        stopped: Why it ended before all epochs were done; None where it did not.

    Examples:
        >>> import prunekit as pk
        >>> model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
        >>> digits = pk.open_data("digits", "train")
        >>> _ = pk.train(model, pk.TrainConfig(epochs=1, device="cpu"), digits)
        >>> small, few = pk.slim(model, ratio=0.3).model, digits.sample(64)
        >>> healed = pk.heal(small, model, few, pk.HealConfig(epochs=1, device="cpu"))
        >>> healed.after >= healed.before, healed.images
        (True, (58, 6))
    """

    model: nn.Module
    before: float
    after: float
    epochs: int
    images: tuple[int, int]
    seconds: float
    stopped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what is told of it, JSON-ready."""
        agreement = {"before": self.before, "after": self.after}
        images = {"images": self.images[0], "held_out": self.images[1]}
        return {
            "agreement": agreement,
            "epochs": self.epochs,
            **images,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }


def heal(
    model: nn.Module,
    original: nn.Module,
    images: ImageSet | Images,
    config: HealConfig | None = None,
    *,
    state_path: str | Path | None = None,
    resume: bool = False,
    on_event: Sink | None = None,
) -> Healed:
    """Bring a pruned network closer to its original, without labels: it learns what the original's blocks give.

    It sees few images, shifted and mirrored, each time others, and is to give what the original gives for the same:
    answers, and the outputs of all blocks that have their old shape. Every tenth image is held out. What agrees best
    with the original there is returned, the beginning included, so that it never gets worse on them.

    Batch norms normalise by the images of a step while it learns. The statistics that they have afterwards are those of
    the beginning, moved as far as they move on the given images, where that does better: few images do not spoil them.

    Args:
        model: A pruned network, best restored already; it stays as it is.
        original: The network that it was cut from.
        images: Images, without labels: a set, or a tensor `(N, C, H, W)` or batches of them, normalised.
        config: The settings, such as the time that it may take.
        state_path: A file for the state, from which an interrupted run can `resume`.
        resume: Go on from that state.
        on_event: Called with the events of `prunekit.training.events`; accuracy is agreement with the original there.

    Raises:
        InputError: The networks or the images do not fit, the images show one class, or the time is too short.
        TrainingError: There is nothing to resume from.
        Interrupted: A signal stopped it; the state is saved.

    Examples:
        >>> import prunekit as pk
        >>> model = pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"})
        >>> digits = pk.open_data("digits", "train")
        >>> _ = pk.train(model, pk.TrainConfig(epochs=1, device="cpu"), digits)
        >>> small = pk.slim(model, ratio=0.3).model
        >>> healed = pk.heal(small, model, digits.sample(64), pk.HealConfig(epochs=1, device="cpu"))
        >>> healed.model is small, healed.epochs
        (False, 1)
    """
    config = config or HealConfig()
    config.check()
    if process_count() > 1:
        raise InputError("healing runs in one process", hint="start it without torchrun")
    started = time.perf_counter()
    task = Task.of(model, original, images)
    before = task.score(task.model)
    plan, data = task.planned(config, started, Path(state_path) if resume and state_path else None)
    watch = Watch(started + config.seconds, plan.epochs, on_event)
    try:
        train(
            task.model,
            plan,
            data,
            task.held_out,
            teacher=task.original,
            state_path=state_path,
            resume=resume,
            extra={"images": len(data)},
            enough=watch,
        )
    except TrainingError as error:
        if not watch.began:
            raise
        watch.stopped = error.message
    result, after = task.settled(model, before)
    counts = len(task.train), len(task.held_out)
    seconds = time.perf_counter() - started
    healed = Healed(result, before[0], after[0], plan.epochs, counts, seconds, watch.stopped)
    origin = origin_of(model)
    if origin is not None:
        settings = {name: getattr(plan, name) for name in ("epochs", "batch_size", "lr", "seed")}
        remember(result, origin.after({"method": "heal", "settings": settings, "healing": healed.to_json()}))
    return healed
