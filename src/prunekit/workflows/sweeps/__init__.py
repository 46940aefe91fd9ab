"""Sweeps: a list of points (variant, budget, seed), each a network that is made and measured, one row of figures.

    points.py    the vocabulary: variants, axes, points and their JSON
    making.py    the network of a point: pruned, perhaps tuned; or with gates, trained
    running.py   all points that are not known yet, one after the other
    summary.py   points of all seeds in one, and the network to recommend

Tables, pictures and pages (`prunekit.report`) are views of the points.
"""
