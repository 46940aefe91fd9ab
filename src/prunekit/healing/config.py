"""`HealConfig`: how long a network is healed, and on what terms. It needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prunekit.errors import InputError

MINUTES = 10.0


@dataclass(frozen=True)
class HealConfig:
    """The settings of `heal`.

    Attributes:
        seconds: Time that may be taken. The epochs are planned by measured speed to fit into it.
        epochs: Their number, at most; by default as many as the time allows, up to 150,000 views of images.
        lr: Peak of the learning rate; by default what suits the batch.
        batch_size: Images of a step; by default for about 64 steps an epoch, but at least 16 and at most 128.
        device: Where to heal, such as `cpu` or `cuda`; by default a GPU where there is one.
        seed: Of everything random.

    Examples:
        >>> import prunekit as pk
        >>> pk.HealConfig(seconds=0).check()
        Traceback (most recent call last):
        prunekit.errors.InputError: healing takes time, and 0 seconds are none
        give it minutes, such as --heal-time 10m
    """

    seconds: float = 60 * MINUTES
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    device: str = "auto"
    seed: int = 0

    def check(self) -> None:
        """Raise `InputError` for values out of range."""
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise InputError(
                f"healing takes time, and {self.seconds:g} seconds are none",
                hint="give it minutes, such as --heal-time 10m",
            )
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise InputError(f"{name.replace('_', ' ')} must be at least 1, got {value}")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr must be above 0, got {self.lr:g}")
