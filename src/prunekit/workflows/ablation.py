"""Ablation of ManiDP: its two losses together, alone and not at all, beside a dynamic and a static control.

All variants are trained alike from one network and calibrated to the same mean MACs. The dynamic control keeps equally
many channels of a layer for every image (Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", ICLR
2019): as many as the calibrated gates keep on average, in the network trained without either loss. The static control
is the network pruned by L1 norm, restored from images, and tuned as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import api, checkpoint, models
from prunekit.data import ImageSet
from prunekit.errors import InputError, SurgeryError
from prunekit.evaluation.score import evaluate
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.fit import add_gates, fit
from prunekit.methods.manidp.rank_correlation import spearman
from prunekit.methods.manidp.record import observe
from prunekit.methods.manidp.thresholds import calibrate
from prunekit.methods.manidp.view import GatedView
from prunekit.spec import origin_of
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import Sink

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "both": {},
    "complexity": {"no_similarity": True},
    "similarity": {"no_complexity": True},
    "neither": {"no_complexity": True, "no_similarity": True},
}
"""The settings of a recipe that leave losses out, by what remains."""
DENSE, STATIC, CONSTANT = "dense", "static control", "dynamic control"
_BATCH = 250
_CALIBRATION, _RESTORATION = 2000, 1000  # training images


@dataclass(frozen=True)
class AblationRow:
    """One network on the test images: `accuracy` (0 to 1), mean `macs` without those of gates, and for networks with
    gates the 5th and 95th percentile of the MACs and their rank correlation with the loss. `error` says why there is
    no figure.
    """

    label: str
    accuracy: float | None = None
    macs: float | None = None
    macs_p5_p95: tuple[float, float] | None = None
    spearman: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**vars(self), "macs_p5_p95": None if self.macs_p5_p95 is None else list(self.macs_p5_p95)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AblationRow:
        """Read the JSON that `to_json` wrote; raise `TypeError` or `ValueError` for anything else."""
        span = data["macs_p5_p95"]
        row = cls(**{**data, "macs_p5_p95": None if span is None else tuple(span)})
        for value in (row.accuracy, row.macs, row.spearman, *(row.macs_p5_p95 or (None, None))):
            if not isinstance(value, int | float | None):
                raise TypeError(f"{value!r} is no figure")
        if row.macs_p5_p95 is not None and len(row.macs_p5_p95) != 2:
            raise ValueError(f"{span} is no pair")
        return row


@dataclass(frozen=True)
class Ablation:
    """What all variants share: the trained network, the gates, how everything is trained, the share of the dense MACs
    to meet, and the folder in which finished networks, and the state of an interrupted one, are kept.
    """

    start: nn.Module
    recipe: GateRecipe
    config: TrainConfig
    target: float
    train_set: ImageSet
    test_set: ImageSet
    folder: Path
    on_event: Sink | None = field(default=None, compare=False)

    @property
    def labels(self) -> list[str]:
        """The rows, in order."""
        return [DENSE, *VARIANTS, CONSTANT, STATIC]

    def row(self, label: str) -> AblationRow:
        """Train what `label` names, unless the folder has it already, and measure it."""
        try:
            if label in VARIANTS or label == CONSTANT:
                return self._dynamic(label)
            found = evaluate(self.start if label == DENSE else self._static(), self.test_set)
        except _UnmetError as error:
            return AblationRow(label, error=str(error))
        return AblationRow(label, found.accuracy, found.macs)

    def _dynamic(self, label: str) -> AblationRow:
        name = "neither" if label == CONSTANT else label
        recipe = replace(self.recipe, **VARIANTS[name])

        def make(**run: Any) -> nn.Module:
            gated = add_gates(self.start, recipe)
            fit(gated, recipe, self.config, self.train_set, on_event=self.on_event, **run)
            return gated

        view = GatedView.of(self._kept(name, make).eval())
        with _meeting_the_target():
            calibrate(view, self._calibration, self.target * view.cost.dense, f"{100 * self.target:g}%")
        with equally_many(view, self._calibration()) if label == CONSTANT else contextlib.nullcontext():
            return measured_row(label, view, self.test_set)

    def _static(self) -> nn.Module:
        def make(**run: Any) -> nn.Module:
            images = next(self.train_set.sample(min(_RESTORATION, len(self.train_set)), seed=0).batches(_RESTORATION))
            amount = f"{100 * self.target:g}%"
            with _meeting_the_target():
                found = api.prune("merge", self.start, images=images[0], target_macs=amount, criterion="l1-norm")
            small = found.model
            train(small, self.config, self.train_set, on_event=self.on_event, **run)
            return small

        return self._kept("static", make)

    def _calibration(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.train_set.sample(min(_CALIBRATION, len(self.train_set)), seed=0).batches(_BATCH)

    def _kept(self, name: str, make: Callable[..., nn.Module]) -> nn.Module:
        """Return the network `name` of the folder, made and written where it is not there."""
        path, state = self.folder / f"{name}.pt", self.folder / f"{name}.state"
        if path.exists():
            origin = origin_of(self.start)
            code = origin.arch if origin and models.is_code(origin.arch) else None
            return checkpoint.load(path, arch=code)
        made = make(state_path=state, resume=state.exists())
        checkpoint.save(made, path)
        state.unlink(missing_ok=True)
        return made


class _UnmetError(Exception):
    """The target cannot be met, for the reason given."""


@contextlib.contextmanager
def _meeting_the_target() -> Iterator[None]:
    try:
        yield
    except (InputError, SurgeryError) as error:
        raise _UnmetError(error.message) from error


def measured_row(label: str, view: GatedView, images: ImageSet) -> AblationRow:
    """Measure a network with gates, in eval mode and with its present thresholds, on labelled images."""
    record = observe(view, images.batches(_BATCH))
    low, high = torch.quantile(record.macs, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return AblationRow(label, record.accuracy, record.mean_macs, (low, high), spearman(record.macs, record.losses))


@contextlib.contextmanager
def equally_many(view: GatedView, images: Iterator[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, each layer keeps the channels with the largest saliencies of each image, equally many for all images: as
    many as its gates keep of `images` on average.
    """
    means = observe(view, images).kept.double().mean(dim=0).tolist()
    for layer, mean in zip(view.layers.values(), means, strict=True):
        layer.kept = _largest(max(1, round(mean)))  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in view.layers.values():
            del layer.kept


def _largest(count: int) -> Callable[[Tensor], Tensor]:
    def kept(pi: Tensor) -> Tensor:
        return pi * (pi >= pi.topk(count, dim=1).values[:, -1:]).to(pi.dtype)

    return kept
