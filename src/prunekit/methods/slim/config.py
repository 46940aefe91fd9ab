"""The settings of Network Slimming."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.methods.base import Config, option
from prunekit.restoration.registry import restorations
from prunekit.restoration.ways import Calibrate


@dataclass(frozen=True)
class SlimConfig(Config):
    """Settings of Network Slimming."""

    scope: str = option(
        "all", help="'inner' leaves channels alone that several layers share by addition.", choices=("all", "inner")
    )
    aggregate: str = option(
        "max", help="How the gammas of coupled channels become one score.", choices=("max", "mean", "sum")
    )
    restore: str | None = option(
        None,
        help="Any installed way of restoring (`prunekit methods` lists them): 'calibrate' refits what stays to "
        "unlabelled images (the default when there are any), 'synthetic' to images made from the network itself; "
        "'constants' folds what a removed channel is worth on average, act(beta), into the next layer (the default "
        "without images, and where every other way begins); 'none' drops it as the paper's release does.",
        choices=restorations,
    )
    memory: str = option(
        Calibrate.memory,
        help="What the images may hold in memory that wait at a layer which 'calibrate' or 'synthetic' refits, such as "
        "2GiB or 500MB. What is more waits in a temporary file.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        Calibrate(self.memory)  # which checks it
