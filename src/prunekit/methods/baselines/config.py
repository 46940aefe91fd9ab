"""The settings of the baselines."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.methods.base import Config, option
from prunekit.restoration.registry import restorations


@dataclass(frozen=True)
class BaselineConfig(Config):
    """Settings of a baseline."""

    restore: str = option(
        "none",
        help="'none' only prunes, as the papers do; or any installed way of restoring (`prunekit methods` lists them).",
        choices=restorations,
    )


@dataclass(frozen=True)
class RandomConfig(BaselineConfig):
    """Settings of the removal of random channels."""

    seed: int = option(0, help="Seed of the draw: the same seed gives the same channels.")
