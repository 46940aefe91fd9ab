"""prunekit makes trained PyTorch networks smaller and really faster, with proof.

What stands here is the whole Python interface; everything is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit.api import Inspection, Pruned, apply, export, inspect, load, merge, prune, slim, verify
    from prunekit.checkpoint import save
    from prunekit.data import open_data
    from prunekit.errors import CheckFailed, InputError, PrunekitError, SurgeryError, TrainingError
    from prunekit.evaluation.score import EvalResult, evaluate
    from prunekit.plan import Fold, Keep, Plan, Refit

__version__ = "0.1.0"

_HOME = {
    "prunekit.api": ("Inspection", "Pruned", "apply", "export", "inspect", "load", "merge", "prune", "slim", "verify"),
    "prunekit.checkpoint": ("save",),
    "prunekit.data": ("open_data",),
    "prunekit.errors": ("CheckFailed", "InputError", "PrunekitError", "SurgeryError", "TrainingError"),
    "prunekit.evaluation.score": ("EvalResult", "evaluate"),
    "prunekit.plan": ("Fold", "Keep", "Plan", "Refit"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CheckFailed",
    "EvalResult",
    "Fold",
    "InputError",
    "Inspection",
    "Keep",
    "Plan",
    "Pruned",
    "PrunekitError",
    "Refit",
    "SurgeryError",
    "TrainingError",
    "apply",
    "evaluate",
    "export",
    "inspect",
    "load",
    "merge",
    "open_data",
    "prune",
    "save",
    "slim",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'prunekit' has no attribute '{name}'")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
