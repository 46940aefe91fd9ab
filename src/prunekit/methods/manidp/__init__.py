"""ManiDP: dynamic pruning that follows each input, regularised by the manifold of the data (Tang et al., "Manifold
Regularized Dynamic Network Pruning", CVPR 2021).

    config.py      the settings, without torch
    gating.py      which layers of a network get gates
    objective.py   the two losses and the schedule, on prunekit's training loop
    view.py        a gated network, its graph and its cost, read once
    costs.py       what an input costs: MACs from the channels that its gates keep
    record.py      gates watched over a data set: saliencies kept, MACs, answers, manifolds
    variants.py    without a loss, or with equally many channels for every image: for comparison
    thresholds.py  thresholds for a share of MACs or channels
    budgets.py     budgets that a network keeps: thresholds and batch-norm statistics
    elastic.py     training for a range of budgets
    static.py      never-on channels removed for good
    runtimes/      ways of running a gated network faster than its masks

What stands in `__all__` is public, as `prunekit.manidp`, and imported when it is first used.

Examples:
    >>> import prunekit as pk
    >>> digits = pk.open_data("digits", "train")
    >>> recipe = pk.manidp.GateRecipe(keep=0.6)
    >>> model = pk.manidp.add_gates(pk.load("prunekit:vgg_digits", arch_args={"config": "8-M-16"}), recipe)
    >>> _ = pk.manidp.train(model, recipe, pk.TrainConfig(epochs=1, device="cpu"), digits)
    >>> view = pk.manidp.GatedView.of(model.eval())
    >>> budget = pk.manidp.calibrate(view, digits.batches, 0.7 * view.cost.dense, "70%")
    >>> round(budget.realised / view.cost.dense, 1)
    0.7
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.lazy import lazily

if TYPE_CHECKING:
    from prunekit.methods.manidp.budgets import calibrate, calibrate_all, use_budget
    from prunekit.methods.manidp.config import GateRecipe
    from prunekit.methods.manidp.costs import DynamicCost
    from prunekit.methods.manidp.difficulty import foresee
    from prunekit.methods.manidp.fit import add_gates
    from prunekit.methods.manidp.fit import fit as train
    from prunekit.methods.manidp.rank_correlation import spearman
    from prunekit.methods.manidp.record import Record, observe
    from prunekit.methods.manidp.runtimes.buckets import add_buckets, bucketed
    from prunekit.methods.manidp.runtimes.choose import accelerate, dense, images_like, masked
    from prunekit.methods.manidp.static import prune_static
    from prunekit.methods.manidp.thresholds import Calibration
    from prunekit.methods.manidp.variants import VARIANTS, AblationRow, equally_many, measured_row
    from prunekit.methods.manidp.view import GatedView
    from prunekit.nn.gated import GatedConv, gated_layers

_HOME = {
    "prunekit.methods.manidp.budgets": ("calibrate", "calibrate_all", "use_budget"),
    "prunekit.methods.manidp.config": ("GateRecipe",),
    "prunekit.methods.manidp.costs": ("DynamicCost",),
    "prunekit.methods.manidp.difficulty": ("foresee",),
    "prunekit.methods.manidp.fit": ("add_gates", "fit as train"),
    "prunekit.methods.manidp.rank_correlation": ("spearman",),
    "prunekit.methods.manidp.record": ("Record", "observe"),
    "prunekit.methods.manidp.runtimes.buckets": ("add_buckets", "bucketed"),
    "prunekit.methods.manidp.runtimes.choose": ("accelerate", "dense", "images_like", "masked"),
    "prunekit.methods.manidp.static": ("prune_static",),
    "prunekit.methods.manidp.thresholds": ("Calibration",),
    "prunekit.methods.manidp.variants": ("VARIANTS", "AblationRow", "equally_many", "measured_row"),
    "prunekit.methods.manidp.view": ("GatedView",),
    "prunekit.nn.gated": ("GatedConv", "gated_layers"),
}

__all__ = [
    "VARIANTS",
    "AblationRow",
    "Calibration",
    "DynamicCost",
    "GateRecipe",
    "GatedConv",
    "GatedView",
    "Record",
    "accelerate",
    "add_buckets",
    "add_gates",
    "bucketed",
    "calibrate",
    "calibrate_all",
    "dense",
    "equally_many",
    "foresee",
    "gated_layers",
    "images_like",
    "masked",
    "measured_row",
    "observe",
    "prune_static",
    "spearman",
    "train",
    "use_budget",
]

if not TYPE_CHECKING:  # to a type checker, it would make every name a name of this module
    __getattr__ = lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
