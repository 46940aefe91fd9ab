"""The settings of Neuron Merging."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.methods.base import Config, option
from prunekit.restoration.registry import restorations
from prunekit.restoration.ways import Calibrate, Paper


@dataclass(frozen=True)
class MergeConfig(Config):
    """Settings of Neuron Merging; the defaults are the paper's for ResNet-56 and VGG-16 on CIFAR-10."""

    criterion: str | None = option(
        None,
        help="Which filters stay: the largest norms, the largest sums of distances to all others, or, by 'pivot', "
        "those that explain best what the next layers read. Default: pivot where activations are measured (calibrate, "
        "synthetic), l2-norm where moments are modelled, else the paper's l1-norm.",
        choices=("l1-norm", "l2-norm", "l2-GM", "pivot"),
    )
    restore: str | None = option(
        None,
        help="Any installed way of restoring (`prunekit methods` lists them): 'moments' solves for the next layer's "
        "weights in closed form; 'paper' merges each removed filter into a kept one; 'closed-form' takes the better of "
        "the two for each layer, or prunes it plainly (the default without images); 'synthetic' refits to images made "
        "from the network itself; 'constants' keeps what removed channels are worth on average; none of these needs "
        "data. 'calibrate' refits to unlabelled images (the default when there are any), 'few' to views of up to 100 "
        "of them and to made ones; 'none' only prunes.",
        choices=restorations,
    )
    widths: str | None = option(
        None,
        help="'uniform' takes the same share of every layer; 'loss' takes most where least is lost, within the "
        "parameters and MACs of the same uniform ratio; 'measured' likewise, by what the outputs lose with each layer "
        "narrowed and refitted alone, or a whole residual block gone (slower; needs images). Default: uniform for "
        "paper and none, else loss.",
        choices=("uniform", "loss", "measured"),
    )
    scope: str = option(
        "inner",
        help="'inner' narrows only layers that can be made up for; 'all' also residual streams and the rest, plainly "
        "where it must be.",
        choices=("inner", "all"),
    )
    refit_bn: bool = option(False, help="Then re-estimate batch-norm statistics on the images (given or made).")
    seed: int = option(0, help="Seed of everything random, such as the images that --restore synthetic makes.")
    memory: str = option(
        Calibrate.memory,
        help="What the images may hold in memory that wait at a layer which 'calibrate' or 'synthetic' refits, such as "
        "2GiB or 500MB. What is more waits in a temporary file.",
    )
    threshold: float = option(
        Paper.threshold, help="Least cosine similarity of two filters that are merged (the paper's t)."
    )
    lam: float = option(
        Paper.lam, help="Weight of the cosine against the batch-norm bias distance (lambda).", flag="--lambda"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        Paper(self.threshold, self.lam)  # which checks them
        Calibrate(self.memory)
