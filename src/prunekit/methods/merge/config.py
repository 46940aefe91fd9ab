"""The settings of Neuron Merging."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.errors import InputError
from prunekit.methods.base import Config, option


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
        help="'moments' solves for the next layer's weights in closed form; 'paper' merges each removed filter into a "
        "kept one; 'synthetic' refits to images made from the network itself; none of these needs data. 'calibrate' "
        "refits to unlabelled images (the default when there are any); 'none' only prunes. Default without images: "
        "moments for each layer that they can be modelled for, else the paper's way, else plain pruning.",
        choices=("calibrate", "synthetic", "moments", "paper", "none"),
    )
    widths: str | None = option(
        None,
        help="'uniform' takes the same share of every layer; 'loss' takes most where least is lost, within the "
        "parameters and MACs of the same uniform ratio. Default: uniform for paper and none, else loss.",
        choices=("uniform", "loss"),
    )
    scope: str = option(
        "inner",
        help="'inner' narrows only layers that can be made up for; 'all' also residual streams and the rest, plainly "
        "where it must be.",
        choices=("inner", "all"),
    )
    refit_bn: bool = option(False, help="Then re-estimate batch-norm statistics on the images (given or made).")
    seed: int = option(0, help="Seed of everything random, such as the images that --restore synthetic makes.")
    threshold: float = option(0.1, help="Least cosine similarity of two filters that are merged (the paper's t).")
    lam: float = option(
        0.85, help="Weight of the cosine against the batch-norm bias distance (lambda).", flag="--lambda"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("threshold", -1.0), ("lam", 0.0)):
            if not low <= getattr(self, name) <= 1:
                flag = "lambda" if name == "lam" else name
                raise InputError(f"--{flag} must lie between {low:g} and 1, not {getattr(self, name)}")
