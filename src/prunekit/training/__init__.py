"""Training: one loop, with Network Slimming's sparsity, that can be interrupted and resumed, on one process or many."""

from __future__ import annotations

from prunekit.training.config import TrainConfig
from prunekit.training.entry import TrainResult, train
from prunekit.training.events import EpochEvent, Event, SaveEvent, Sink, StartEvent, StepEvent
from prunekit.training.sinks import MetricsFile, TensorBoard
from prunekit.training.state import State
from prunekit.training.world import is_main_process

__all__ = [
    "EpochEvent",
    "Event",
    "MetricsFile",
    "SaveEvent",
    "Sink",
    "StartEvent",
    "State",
    "StepEvent",
    "TensorBoard",
    "TrainConfig",
    "TrainResult",
    "is_main_process",
    "train",
]
