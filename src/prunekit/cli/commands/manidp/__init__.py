"""`prunekit manidp`: dynamic pruning, from a trained network to a faster one."""

from __future__ import annotations

from prunekit.cli.commands.manidp import ablate, calibrate, prune_static, report, train

COMMANDS = {
    "train": ("Put gates into a trained network and train both.", train.COMMAND),
    "calibrate": ("Set the gates' thresholds for budgets, and cut static sub-networks.", calibrate.COMMAND),
    "report": ("What the gates do with a data set, as one page and as pictures.", report.COMMAND),
    "ablate": ("What each loss is worth, beside a dynamic and a static control.", ablate.COMMAND),
    "prune-static": ("Remove the channels that no image keeps for good.", prune_static.COMMAND),
}
