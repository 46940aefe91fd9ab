"""What is healed, by what and on what: networks and images that fit together."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from prunekit import surgery
from prunekit.data import ImageSet, check_input
from prunekit.errors import InputError, TrainingError
from prunekit.healing.answered import answered, image_set, parted
from prunekit.healing.config import HealConfig
from prunekit.healing.mixing import MixedImages
from prunekit.healing.norms import Statistics, measured, move, statistics_of
from prunekit.healing.pace import epochs_within, seconds_of_a_step
from prunekit.restoration.images import Images, Inputs, gather
from prunekit.spec import origin_of
from prunekit.surgery import Graph
from prunekit.surgery.copying import copied
from prunekit.surgery.tracing.tracer import example_of
from prunekit.tasks.logits import class_scores
from prunekit.tasks.nests import floating_type
from prunekit.training.config import TrainConfig, batch_for, rate_factor
from prunekit.training.forward import answer
from prunekit.training.state import State

_RATE, _MATCH = 0.01, 25.0  # of batches of 128; weight of the blocks beside the answers
_WARMUP = 0.05  # of the epochs
_LEAST_VIEWS = 256  # of an epoch: fewer images are taken several times, each time varied


@dataclass(frozen=True)
class Task:
    """One healing.

    Attributes:
        model: A copy of the pruned network, to be healed in place.
        original: The network that teaches, out of its wrappers.
        train: The images to heal on, labelled with the answers of the original.
        held_out: Others, likewise.
        graph: The original as it was read.
        inputs: All images as the networks read them, `(N, C, H, W)`.
        before: The statistics of the pruned network's batch norms.
        shown: What they are on the images.
    """

    model: nn.Module
    original: nn.Module
    train: ImageSet
    held_out: ImageSet
    graph: Graph
    inputs: Tensor
    before: Statistics
    shown: Statistics

    @classmethod
    def of(cls, model: nn.Module, original: nn.Module, images: ImageSet | Images) -> Task:
        """Return the task.

        Raises:
            InputError: The networks or the images do not fit.
        """
        small, teacher = (copied(surgery.unwrapped(one)).eval() for one in (model, original))
        graph = surgery.trace(teacher, example_of(teacher, (1, *_shape(small, teacher, images))))
        data = images if isinstance(images, ImageSet) else image_set(_one_input(gather(images, teacher, graph)))
        inputs, before = data.inputs().to(next(small.parameters())), statistics_of(small)
        shown = measured(small, graph, inputs) if before else {}
        _check(small, teacher, inputs[:2])
        train, held_out = parted(answered(teacher, data))
        return cls(small, teacher, train, held_out, graph, inputs, before, shown)

    def planned(self, config: HealConfig, started: float, state: Path | None) -> tuple[TrainConfig, ImageSet]:
        """Return the settings of the run, and its images: as many epochs as the time allows, or those of `state`.

        Raises:
            InputError: The time is too short for one step.
        """
        data: ImageSet = MixedImages.of(self.train)
        if len(data) < _LEAST_VIEWS:
            data = data.subset(torch.arange(_LEAST_VIEWS) % len(data))
        batch = min(len(data), config.batch_size or batch_for(len(data)))
        plan = TrainConfig(
            batch_size=batch,
            lr=_RATE * rate_factor(batch) if config.lr is None else config.lr,
            distill=1.0,
            match=_MATCH,
            keep="best",
            device=config.device,
            seed=config.seed,
            log_every=1,
        )
        if state is not None:
            known = State.load(state).settings
            epochs, count = known["epochs"], known["extra"]["images"]
        else:
            step = seconds_of_a_step(self.model, self.original, data, plan)
            ready = time.perf_counter() - started
            epochs, count = epochs_within(config.seconds, ready, step, len(data), batch)
            epochs = min(epochs, config.epochs or epochs)
        data = data if count >= len(data) else data.sample(count, seed=config.seed)
        return dataclasses.replace(plan, epochs=epochs, warmup=_WARMUP * epochs), data

    def settled(self, given: nn.Module, before: tuple[float, float]) -> tuple[nn.Module, tuple[float, float]]:
        """Return the better of the healed network and the one that was `given`, and its score.

        Batch norms get the statistics of the beginning, moved as far as they move on the images, if that does better.
        """
        after = self.score(self.model)
        if after <= before:
            return copied(given), before
        if not self.before:
            return self.model, after
        moved = copied(self.model)
        move(moved, self.before, self.shown, measured(self.model, self.graph, self.inputs))
        return max((self.model, after), (moved, self.score(moved)), key=lambda one: one[1])

    @torch.no_grad()
    def score(self, model: nn.Module) -> tuple[float, float]:
        """Return a network's agreement with the original on the held-out images, and its negative cross-entropy."""
        device, found = next(model.parameters()).device, []
        for images, labels in self.held_out.batches(64, device=device, dtype=floating_type(model)):
            scores = class_scores(answer(model, images), len(labels))[0].float()
            right = (scores.argmax(1) == labels).sum()
            found.append(torch.stack([right, -nn.functional.cross_entropy(scores, labels, reduction="sum")]))
        agree, loss = (torch.stack(found).sum(0) / len(self.held_out)).tolist()
        return agree, loss


def _one_input(inputs: Tensor | Inputs) -> Tensor:
    if isinstance(inputs, Inputs):
        raise InputError("only a network with a single input can be healed")
    return inputs


def _shape(small: nn.Module, teacher: nn.Module, images: ImageSet | Images) -> tuple[int, ...]:
    """Return the shape `(C, H, W)` of the images that the networks read."""
    known = [origin.input.shape for one in (teacher, small) if (origin := origin_of(one)) and origin.input]
    if len(set(known)) > 1:
        one, other = ("x".join(map(str, shape)) for shape in known)
        raise InputError(f"the original reads images of {one}, and the pruned network of {other}")
    if isinstance(images, ImageSet):
        if known:
            check_input(known[0], images)
        return tuple(images.input_spec.shape)
    if known:
        return tuple(known[0])
    if isinstance(images, Tensor):
        return tuple(images.shape[1:])
    raise InputError("the size of the images is not known", hint="give them as one tensor (N, C, H, W)")


@torch.no_grad()
def _check(small: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    """Raise `InputError` unless both networks read the images and answer with as many classes."""
    if len(images) < 2:
        raise InputError("healing needs at least two images: one of them is held out")
    classes = []
    for network, what in ((teacher, "original"), (small, "pruned network")):
        try:
            classes.append(class_scores(answer(network, images), len(images))[0].shape[1])
        except TrainingError as error:
            raise InputError(f"the {what} cannot read these images: {error.message}", hint=error.hint) from error
    if len(set(classes)) > 1:
        raise InputError(
            f"the original knows {classes[0]} classes, and the pruned network {classes[1]}",
            hint="heal with the network that was pruned",
        )
