"""The functions of the Python face; the command line is a thin layer on them. `prunekit/__init__.py` exports them."""

from __future__ import annotations

from prunekit.api.by_hand import apply, inspect, restore, verify
from prunekit.api.files import export, load
from prunekit.api.methods import merge, slim
from prunekit.api.own_loop import narrow_state
from prunekit.api.pruning import make_config, prune
from prunekit.api.results import Inspection, Pruned

__all__ = [
    "Inspection",
    "Pruned",
    "apply",
    "export",
    "inspect",
    "load",
    "make_config",
    "merge",
    "narrow_state",
    "prune",
    "restore",
    "slim",
    "verify",
]
