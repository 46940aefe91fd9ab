"""Ablation of ManiDP: its two losses together, alone and not at all, beside a dynamic and a static control.

All variants are trained alike from one network and calibrated to the same mean MACs. The dynamic control keeps equally
many channels of a layer for every image (Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", ICLR
2019): as many as the calibrated gates keep on average, in the network trained without either loss. The static control
is the network pruned by L1 norm, restored from images, and tuned as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunekit import api, checkpoint, models
from prunekit.data import ImageSet
from prunekit.errors import InputError, SurgeryError
from prunekit.evaluation.score import evaluate
from prunekit.methods.manidp.budgets import calibrate
from prunekit.methods.manidp.config import GateRecipe
from prunekit.methods.manidp.fit import add_gates, fit
from prunekit.methods.manidp.variants import VARIANTS, AblationRow, equally_many, measured_row
from prunekit.methods.manidp.view import GatedView
from prunekit.spec import origin_of
from prunekit.training.config import TrainConfig
from prunekit.training.entry import train
from prunekit.training.events import Sink

DENSE, STATIC, CONSTANT = "dense", "static control", "dynamic control"
_BATCH = 250
_CALIBRATION, _RESTORATION = 2000, 1000  # training images


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
