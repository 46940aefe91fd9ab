"""Latency as a goal: time the network, model its time, and hand methods what they need to come down to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from prunekit import surgery
from prunekit.api.subject import Subject, at_work, example_input
from prunekit.devices import device_of
from prunekit.errors import InputError
from prunekit.evaluation.timing import runners
from prunekit.evaluation.timing.apart import milliseconds_apart
from prunekit.evaluation.timing.cache import layer_times
from prunekit.evaluation.timing.conditions import Conditions, milliseconds
from prunekit.evaluation.timing.layers import layers_of
from prunekit.evaluation.timing.model import LatencyModel
from prunekit.methods.base import Config
from prunekit.methods.goal import LatencyGoal, latency_within, read_latency
from prunekit.plan import Keep, Plan
from prunekit.progress import counter
from prunekit.surgery import Graph

LEAST, MOST = 0.92, 1.03  # shares of the goal within which it counts as met


class Stopwatch:
    """Times networks against the original: what it took then is `present`, and what others take goes by that.

    Minutes lie between the first measurement and the last, and machines get slower and faster meanwhile. So the
    original is timed again with each network, in turns, and the ratio counts.
    """

    def __init__(self, model: nn.Module, example: Any, conditions: Conditions) -> None:
        self.conditions = conditions
        self._example = example
        counter("timing the network")(0, 0)
        self._original = self._ready(model)
        (self.present,), self.spread = self._timed([self._original])

    def __call__(self, model: nn.Module) -> float:
        """Return the milliseconds of a pass of `model`.

        Raises:
            InputError: The machine is too noisy, or the network does not run on inputs like the example.
            SurgeryError: It cannot be exported.
        """
        counter("timing the network")(0, 0)
        (original, taken), spread = self._timed([self._original, self._ready(model)])
        self.spread = max(self.spread, spread)
        return self.present * taken / original

    def _ready(self, model: nn.Module) -> Any:
        """Return what is timed: a file for ONNX Runtime, or a call."""
        make = runners.onnx_file if self.conditions.runtime == "onnx" else runners.network
        return make(model, self._example, self.conditions)

    def _timed(self, ready: Sequence[Any]) -> tuple[list[float], float]:
        """Return the milliseconds of each, timed in turns, and their spread."""
        if self.conditions.runtime == "onnx":
            return milliseconds_apart(ready, self.conditions)
        return milliseconds(ready, self.conditions)


@dataclass(frozen=True)
class Timed:
    """A network that is to come down to a latency: its goal, and how it is timed."""

    goal: LatencyGoal
    stopwatch: Stopwatch

    @classmethod
    def of(cls, subject: Subject, graph: Graph, example: Any, config: Config) -> Timed:
        """Time the network and its layers as `config` says.

        Raises:
            InputError: The goal lies outside what the network takes, or the machine is too noisy.
        """
        read_latency(config.target_latency)
        if subject.home != device_of(subject.plain) and config.latency_on != "onnx":
            raise InputError(
                f"a latency on '{subject.home}', which has no float64, cannot be a goal: networks are pruned elsewhere",
                hint="give --target-macs, and measure what it gives",
            )
        conditions = conditions_of(config, subject.plain)
        stopwatch = Stopwatch(subject.plain, example, conditions)
        amount = latency_within(config.target_latency, stopwatch.present)
        times = layer_times((one.shape for one in layers_of(graph)), conditions)
        model = LatencyModel.of(
            graph, times.at, stopwatch.present, times.overhead, per_call=conditions.runtime == "pytorch"
        )

        def measure(keeps: Mapping[str, Sequence[int]]) -> float:
            plan = Plan(Keep(name, units) for name, units in keeps.items())
            with torch.inference_mode(False):
                return stopwatch(surgery.pruned(subject.plain, subject.plain, plan, graph).model)

        said = f"{conditions.runtime}, batch {conditions.batch}, threads {conditions.threads}"
        return cls(LatencyGoal(amount, stopwatch.present, model.parts, measure, times.block, said), stopwatch)

    def planned_by(self, config: Config) -> Config:
        """Return the settings for the method: with the goal in the place of its text."""
        return replace(config, target_latency=self.goal)

    def notes(self, small: nn.Module, graph: Graph, plan: Plan) -> dict[str, Any]:
        """Return what a plan notes as `latency`: goal, prediction and measurements in milliseconds, and conditions.

        With a warning where the goal was missed.
        """
        after, goal = self.stopwatch(small), self.goal.amount
        found = {
            "goal": goal,
            "before": self.goal.present,
            "predicted": sum(self.goal.predict(graph, surgery.resolve(graph, plan).kept).values()),
            "after": after,
            "met": LEAST <= after / goal <= MOST,
            "spread": self.stopwatch.spread,
            **self.stopwatch.conditions.to_json(),
        }
        if found["met"]:
            return {"latency": found}
        missed = f"the goal of {goal:.3g} ms is missed: {after:.3g} ms measured"
        return {"latency": found, "warning": "; ".join(filter(None, (plan.notes.get("warning"), missed)))}


def conditions_of(config: Config, model: nn.Module) -> Conditions:
    """Return the conditions that the settings ask for, on the network's device."""
    return Conditions.here(config.latency_on, config.latency_batch, config.latency_threads, device_of(model))


def present_latency(model: nn.Module, config: Config) -> float:
    """Return the milliseconds that a network takes now, on inputs of the shape that it remembers."""
    with at_work(model, None):
        subject = Subject.of(model)
        return Stopwatch(subject.plain, example_input(subject.plain, None), conditions_of(config, model)).present
