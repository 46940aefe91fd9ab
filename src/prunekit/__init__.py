"""prunekit makes trained PyTorch networks smaller and really faster, with proof.

What stands here is the whole Python interface; everything is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.lazy import lazily

if TYPE_CHECKING:
    from prunekit import models, surgery
    from prunekit.api import (
        Inspection,
        Pruned,
        apply,
        export,
        inspect,
        load,
        merge,
        narrow_state,
        prune,
        restore,
        slim,
        verify,
    )
    from prunekit.checkpoint import save
    from prunekit.data import Examples, ImageSet, open_data
    from prunekit.errors import CheckFailed, InputError, Interrupted, PrunekitError, SurgeryError, TrainingError
    from prunekit.evaluation.latency import in_turns
    from prunekit.evaluation.paired import Drop
    from prunekit.evaluation.score import EvalResult, evaluate
    from prunekit.healing.config import HealConfig
    from prunekit.healing.heal import Healed, heal
    from prunekit.methods import manidp
    from prunekit.methods.base import Config, Method, option
    from prunekit.methods.ranking import round_widths
    from prunekit.methods.scoring import plan_by_scores
    from prunekit.metric import Metric
    from prunekit.plan import Fold, Gate, Keep, Plan, Refit
    from prunekit.progress import counter, report_progress
    from prunekit.restoration.base import Evidence, Restoration
    from prunekit.restoration.images import Images
    from prunekit.restoration.registry import restorations
    from prunekit.spec import InputSpec
    from prunekit.surgery import ChannelGroup, Cost, Graph
    from prunekit.surgery.tracing.rules.custom import OpCall, set_op_rule
    from prunekit.tasks.base import Task
    from prunekit.tasks.classification import Classification
    from prunekit.tasks.segmentation import Segmentation
    from prunekit.training.config import TrainConfig
    from prunekit.training.entry import TrainResult, train
    from prunekit.training.events import EpochEvent, SaveEvent, StartEvent, StepEvent
    from prunekit.training.penalty import sparsity_penalty
    from prunekit.training.state import State as TrainState
    from prunekit.workflows.fitting.search import fit
    from prunekit.workflows.fitting.trials import Fitted, Trial
    from prunekit.workflows.goals import DropGoal
    from prunekit.workflows.sensitivity import GroupSensitivity, sensitivity
    from prunekit.workflows.sweeps.points import SweepPoint, Variant
    from prunekit.workflows.sweeps.running import sweep

_HOME = {
    "prunekit.api": (
        "Inspection",
        "Pruned",
        "apply",
        "export",
        "inspect",
        "load",
        "merge",
        "narrow_state",
        "prune",
        "restore",
        "slim",
        "verify",
    ),
    "prunekit.checkpoint": ("save",),
    "prunekit.data": ("Examples", "ImageSet", "open_data"),
    "prunekit.errors": ("CheckFailed", "InputError", "Interrupted", "PrunekitError", "SurgeryError", "TrainingError"),
    "prunekit.evaluation.latency": ("in_turns",),
    "prunekit.evaluation.paired": ("Drop",),
    "prunekit.evaluation.score": ("EvalResult", "evaluate"),
    "prunekit.healing.config": ("HealConfig",),
    "prunekit.healing.heal": ("Healed", "heal"),
    "prunekit.methods.base": ("Config", "Method", "option"),
    "prunekit.methods.ranking": ("round_widths",),
    "prunekit.methods.scoring": ("plan_by_scores",),
    "prunekit.metric": ("Metric",),
    "prunekit.plan": ("Fold", "Gate", "Keep", "Plan", "Refit"),
    "prunekit.progress": ("counter", "report_progress"),
    "prunekit.restoration.base": ("Evidence", "Restoration"),
    "prunekit.restoration.images": ("Images",),
    "prunekit.restoration.registry": ("restorations",),
    "prunekit.spec": ("InputSpec",),
    "prunekit.surgery": ("ChannelGroup", "Cost", "Graph"),
    "prunekit.surgery.tracing.rules.custom": ("OpCall", "set_op_rule"),
    "prunekit.tasks.base": ("Task",),
    "prunekit.tasks.classification": ("Classification",),
    "prunekit.tasks.segmentation": ("Segmentation",),
    "prunekit.training.config": ("TrainConfig",),
    "prunekit.training.entry": ("TrainResult", "train"),
    "prunekit.training.events": ("EpochEvent", "SaveEvent", "StartEvent", "StepEvent"),
    "prunekit.training.penalty": ("sparsity_penalty",),
    "prunekit.training.state": ("State as TrainState",),
    "prunekit.workflows.fitting.search": ("fit",),
    "prunekit.workflows.fitting.trials": ("Fitted", "Trial"),
    "prunekit.workflows.goals": ("DropGoal",),
    "prunekit.workflows.sensitivity": ("GroupSensitivity", "sensitivity"),
    "prunekit.workflows.sweeps.points": ("SweepPoint", "Variant"),
    "prunekit.workflows.sweeps.running": ("sweep",),
}
_ROOMS = ("prunekit.methods.manidp", "prunekit.models", "prunekit.surgery")  # public as a whole, by their `__all__`

__version__ = "0.1.0"

__all__ = [
    "ChannelGroup",
    "CheckFailed",
    "Classification",
    "Config",
    "Cost",
    "Drop",
    "DropGoal",
    "EpochEvent",
    "EvalResult",
    "Evidence",
    "Examples",
    "Fitted",
    "Fold",
    "Gate",
    "Graph",
    "GroupSensitivity",
    "HealConfig",
    "Healed",
    "ImageSet",
    "Images",
    "InputError",
    "InputSpec",
    "Inspection",
    "Interrupted",
    "Keep",
    "Method",
    "Metric",
    "OpCall",
    "Plan",
    "Pruned",
    "PrunekitError",
    "Refit",
    "Restoration",
    "SaveEvent",
    "Segmentation",
    "StartEvent",
    "StepEvent",
    "SurgeryError",
    "SweepPoint",
    "Task",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "TrainingError",
    "Trial",
    "Variant",
    "apply",
    "counter",
    "evaluate",
    "export",
    "fit",
    "heal",
    "in_turns",
    "inspect",
    "load",
    "manidp",
    "merge",
    "models",
    "narrow_state",
    "open_data",
    "option",
    "plan_by_scores",
    "prune",
    "report_progress",
    "restorations",
    "restore",
    "round_widths",
    "save",
    "sensitivity",
    "set_op_rule",
    "slim",
    "sparsity_penalty",
    "surgery",
    "sweep",
    "train",
    "verify",
]

if not TYPE_CHECKING:  # to a type checker, it would make every name a name of this module
    __getattr__ = lazily(__name__, _HOME, _ROOMS)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
