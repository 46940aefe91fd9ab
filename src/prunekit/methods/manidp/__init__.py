"""ManiDP: dynamic pruning that follows each input, regularised by the manifold of the data (Tang et al., "Manifold
Regularized Dynamic Network Pruning", CVPR 2021).

    recipe.py      the settings, without torch
    gating.py      which layers of a network get gates
    objective.py   the two losses and the schedule, on prunekit's training loop
    costs.py       what an input costs: MACs from the channels that its gates keep
    record.py      gates watched over a data set: saliencies kept, MACs, answers, manifolds
    thresholds.py  thresholds for a budget, never-on channels removed for good
    runtimes/      ways of running a gated network faster than its masks
"""
