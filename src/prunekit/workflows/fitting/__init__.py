"""Fitting: the smallest network that meets a goal, found by trials of which each is pruned, restored and compared.

    trials.py        the vocabulary: trials, their JSON, and the finished search
    sizes.py         the size to try next, from what the trials lost
    holding_out.py   the images that decide and those that report, none of which serves anything else
    tuning.py        what to tune and for how long, in the time that is left
    tuned.py         the tuning itself
    search.py        the search
    outcome.py       what it comes to on the images that report

Tables, pictures and pages (`prunekit.report`) are views of the trials.
"""
