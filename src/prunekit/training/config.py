"""`TrainConfig`: everything that decides the result of a training run, and how often it saves and reports.

It needs no torch, so that a command can show its flags without importing it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from prunekit.errors import InputError, TrainingError, unknown_name

AUGMENTATIONS = ("none", "shift", "cifar", "imagenet")

LARGEST_BATCH = 128  # that is chosen by itself
_SMALLEST_BATCH = 16
_STEPS = 64  # in an epoch, as far as the limits of a batch allow

# Settings that do not change the result, so that a resumed run may have others.
_FREE = {"free": True}


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of `train`; the defaults are Network Slimming's recipe (Liu et al., ICCV 2017) with a cosine.

    Examples:
        >>> import prunekit as pk
        >>> pk.TrainConfig(epochs=5, optimizer="adamw").peak_lr
        0.001
        >>> pk.TrainConfig(momentum=2).check()
        Traceback (most recent call last):
        prunekit.errors.InputError: momentum must be between 0 and 1, got 2
    """

    epochs: int = _option(10, "passes over the training images")
    batch_size: int | None = _option(
        None,
        "images of one optimiser step, over all processes and accumulation (default: for about 64 steps an epoch, but "
        "at least 16 and at most 128)",
    )
    accumulate: int = _option(1, "parts that a batch is computed in, one after the other, to save memory")
    optimizer: str = _option("sgd", "the optimiser", choices=("sgd", "adamw"))
    lr: float | None = _option(
        None, "learning rate at its peak (default: 0.1 for sgd, 0.001 for adamw; less for small data and tuning)"
    )
    momentum: float = _option(0.9, "momentum of sgd")
    nesterov: bool = _option(True, "Nesterov's form of momentum")
    weight_decay: float = _option(1e-4, "weight decay")
    decay_norm: bool = _option(True, "decay biases and normalisation weights (gamma) as well")
    schedule: str = _option("cosine", "course of the learning rate", choices=("cosine", "step", "constant"))
    milestones: tuple[float, ...] = _option((0.5, 0.75), "step schedule: shares of the run at which the rate falls")
    decay_factor: float = _option(0.1, "step schedule: factor at each milestone")
    warmup: float | None = _option(
        None, "epochs in which the learning rate rises linearly (default: 0; tuning: the more, the more was cut)"
    )
    label_smoothing: float = _option(0.0, "label smoothing")
    sparsity: float = _option(
        0.0, "weight of the L1 norm of the batch-norm gammas in the loss (Network Slimming's lambda)"
    )
    sparsity_scope: str = _option(
        "all",
        "gammas under the penalty: all, or those of the inner channels that no addition shares",
        choices=("all", "inner"),
    )
    proximal: bool = _option(
        False, "apply the same penalty as a soft threshold after each step, which reaches exact zeros"
    )
    distill: float | None = _option(
        None, "share of the loss that comes from the teacher, where there is one (default: 0.5; tuning: 0.9)"
    )
    temperature: float = _option(4.0, "temperature of distillation")
    match: float | None = _option(
        None,
        "weight, in the teacher's share, of the distance between what blocks of both networks give on the way "
        "(default: 0; tuning: 25)",
    )
    clip: float | None = _option(None, "largest norm of the gradient")
    ema: float | None = _option(None, "decay of the exponential moving average of the weights, such as 0.999")
    precision: str = _option("off", "mixed precision", choices=("off", "bf16", "fp16"))
    sync_bn: bool = _option(False, "under torchrun, normalise by the images of all processes, not of each its own")
    channels_last: bool = _option(True, "lay images out channels-last, which is faster")
    augment: str = _option("auto", "augmentation", choices=("auto", *AUGMENTATIONS))
    keep: str | None = _option(
        None,
        "which weights are kept: those of the best validation, the start included, or the last ones "
        "(default: best where a trained network is tuned without a penalty, else last)",
        choices=("best", "last"),
    )
    device: str = _option("auto", "device, such as cpu, cuda, mps or xpu (default: a GPU where there is one)")
    seed: int = _option(0, "seed of everything random")
    save_every: int = _option(0, "steps between states (0: at the end of epochs)", **_FREE)
    save_seconds: float = _option(300.0, "seconds after which a state is saved in any case", **_FREE)
    log_every: int = _option(10, "steps between reports", **_FREE)

    @property
    def peak_lr(self) -> float:
        """The learning rate, with the optimiser's default filled in."""
        return {"sgd": 0.1, "adamw": 1e-3}[self.optimizer] if self.lr is None else self.lr

    @property
    def teacher_share(self) -> float:
        """The share of the loss that comes from a teacher, with the default filled in."""
        return 0.5 if self.distill is None else self.distill

    @property
    def batch(self) -> int:
        """Images of one step, with the default for plenty of images filled in."""
        return LARGEST_BATCH if self.batch_size is None else self.batch_size

    def suited_to(self, images: int) -> TrainConfig:
        """Return these settings with the batch, where it is open, by the number of training images, and the rate by it.

        On the digits (1,264 images, judged on validation images) batches of 128 shrank gammas so little that pruning
        destroyed the network, for each of three seeds; batches of 16 with this rate did not, for both of two.
        """
        if self.batch_size is not None:
            return self
        batch = batch_for(images)
        rate = self.lr if self.lr is not None else self.peak_lr * rate_factor(batch)
        return dataclasses.replace(self, batch_size=batch, lr=rate)

    @property
    def warmup_epochs(self) -> float:
        """Epochs of warm-up, with the default filled in."""
        return self.warmup or 0.0

    def check(self) -> None:
        """Raise `InputError` for a value out of its range, `TrainingError` for settings that cannot go together."""
        for option in dataclasses.fields(self):
            value, choices = getattr(self, option.name), option.metadata.get("choices")
            if choices and value not in choices and not (value is None and option.default is None):
                raise unknown_name(option.name.replace("_", " "), str(value), choices)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                span = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                raise InputError(f"{name.replace('_', ' ')} must be {span}, got {value:g}")
        if self.sparsity and self.optimizer == "adamw" and not self.proximal:
            raise TrainingError(
                "AdamW rescales the L1 term, so that sparsity would not mean its strength",
                hint="use --proximal, or --optimizer sgd",
            )

        if self.sparsity and self.proximal and self.optimizer == "sgd" and self.momentum == 1:
            raise TrainingError("with a momentum of 1, the pull of the penalty has no limit", hint="use --momentum 0.9")

    def settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run must agree on, ready for JSON."""
        options = (o for o in dataclasses.fields(self) if not o.metadata.get("free"))
        values = {o.name: getattr(self, o.name) for o in options}
        values |= {"batch_size": self.batch, "warmup": self.warmup_epochs}
        values |= {"distill": self.teacher_share, "match": self.match or 0.0}
        if self.keep != "best":  # as runs were noted before there was a choice
            del values["keep"]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def batch_for(images: int) -> int:
    """Return the power of two, from 16 to 128, that makes about 64 batches of `images`."""
    size = 1 << round(math.log2(max(1, images / _STEPS)))
    return min(LARGEST_BATCH, max(_SMALLEST_BATCH, size))


def rate_factor(batch: int) -> float:
    """Return by what a learning rate for batches of 128 is multiplied for smaller ones.

    The square root keeps the noise of a step's gradient (Krizhevsky, arXiv 1404.5997).
    """
    return math.sqrt(batch / LARGEST_BATCH)


_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "accumulate": (1, math.inf),
    "lr": (0, math.inf),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
    "decay_factor": (0, 1),
    "warmup": (0, math.inf),
    "label_smoothing": (0, 1),
    "sparsity": (0, math.inf),
    "distill": (0, 1),
    "match": (0, math.inf),
    "temperature": (1e-3, math.inf),
    "clip": (1e-12, math.inf),
    "ema": (0, 1),
    "seed": (0, 2**63 - 1),
    "save_every": (0, math.inf),
    "save_seconds": (0, math.inf),
    "log_every": (1, math.inf),
}
