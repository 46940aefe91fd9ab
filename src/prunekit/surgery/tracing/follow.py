"""Comparison of a narrowed network's run with what was recorded of the whole one, op by op."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.nn.channels import ChannelSelect
from prunekit.surgery.execution.dispatch import DispatchMode, op_name, run_op
from prunekit.surgery.execution.sources import Source
from prunekit.surgery.graph.labels import Mask, channels_in, compact, ids, varying
from prunekit.surgery.graph.recording import Flow, Node, Pass, numbers_of, tensors_in
from prunekit.surgery.ops import COPIES, NORMS, RESHAPES

_log = logging.getLogger(__name__)

# Why a run parts from its recording, to be filled in with the op and its module.
_SIZES = "'{op}' in {module} has sizes written into the code"
_NUMBER = "'{op}' in {module} computes with a number that depends on the width"
_ORDER = "{module} runs other operations at another width, from '{op}' on"

Step = tuple[Node, Flow]


class MisfitError(Exception):
    """The narrowed network does something else than was recorded; holds the reason, to be filled in."""


class _FarEnough(Exception):
    """The narrowed network has come past the place where it used to part."""


def steps_of(run: Pass) -> list[Step]:
    """Return the steps of a pass that are compared."""
    return [step for step in zip(run.nodes, run.flow, strict=True) if not _idle(*step)]


def _idle(node: Node, flow: Flow) -> bool:
    """Return whether an op does nothing that counts: it comes and goes with the geometry of a tensor."""
    return node.op in COPIES or (node.op == "slice" and flow.inputs != () and node.shape == tuple(flow.inputs[0].shape))


def _constant(node: Node, flow: Flow) -> bool:
    """Return whether an op only has to do with constants of the code, which may have been kept since the recording."""
    return not node.parameters and not any(channels_in(labels).size for labels in flow.inputs)


class Follower(DispatchMode):
    """Comparison of one run, up to the step `last` if that is given; `stays` tells which labels are left.

    Other factors than were recorded are no misfit where `scales` is given: there it is noted, by node, what they have
    become, as the logarithm of the ratio.
    """

    def __init__(
        self,
        run: Pass,
        steps: Sequence[Step],
        stays: Mask,
        last: int | None = None,
        scales: dict[int, float] | None = None,
    ) -> None:
        super().__init__()
        self._scales = scales
        self.position = 0
        self._run, self._steps, self._stays, self._last = run, steps, stays, last
        self._away = False  # our own modules are at work
        self._lost = False  # the values have led elsewhere, which tells nothing about widths
        self._expected: dict[int, tuple[int, ...] | None] = {}

    def overlook(self, modules: Iterable[nn.Module]) -> None:
        """Overlook what selections do that were put in when the network was narrowed."""
        for module in modules:
            if isinstance(module, ChannelSelect):
                module.register_forward_pre_hook(self._look_away)
                module.register_forward_hook(self._look_again)

    def _look_away(self, *_: Any) -> None:
        self._away = True

    def _look_again(self, *_: Any) -> None:
        self._away = False

    def follow(self, subject: nn.Module, source: Source) -> str | None:
        """Run the subject; return why it parts from the recording, if it does."""
        inputs = source.inputs(self._run.inputs)
        try:
            with self:
                source.run(subject, inputs)
        except _FarEnough:
            return None
        except MisfitError as error:
            return str(error)
        except Exception as error:  # a forward with fixed sizes fails in as many ways as there are layers
            _log.debug("the probe failed at step %d: %s", self.position, error)
            return _SIZES if self._run.complete or self._left() else None
        return _ORDER if any(not _constant(*step) for step in self._left()) else None

    def _left(self) -> Sequence[Step]:
        return () if self._lost else self._steps[self.position :]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and hold it against the next one that was recorded."""
        name, kwargs = op_name(func), kwargs or {}
        if name == "_local_scalar_dense":  # the same decisions, whatever the weights that are left say
            flow = self._compared(name, func, [], ())
            return run_op(func, args, kwargs) if flow is None else flow.numbers[0]
        out = run_op(func, args, kwargs)
        if name not in COPIES and not self._away and not (name == "slice" and out.shape == args[0].shape):
            self._compared(name, func, list(tensors_in((out,))), numbers_of(name, func, args, kwargs, out))
        return out

    def _compared(self, name: str, func: Any, results: Sequence[Tensor], numbers: Sequence[float]) -> Flow | None:
        """Return what was recorded of an op, if it is as foretold; None where there is nothing to compare with."""
        while self._follows():
            if self.position >= len(self._steps):
                raise MisfitError(_ORDER)
            node, flow = self._steps[self.position]
            why = self._difference(node, flow, name, results, numbers)
            if why == _SIZES and self._led_elsewhere(func):
                self._lost = True
            elif why is None:
                self.position += 1
                return flow
            elif why == _NUMBER or not _constant(node, flow):
                raise MisfitError(why)
            else:
                self.position += 1
        return None

    def _follows(self) -> bool:
        """Return whether there is something to compare with."""
        if self._last is not None and self.position > self._last:
            raise _FarEnough
        if self.position >= len(self._steps) and not self._run.complete:
            self._lost = True
        return not self._lost

    def _led_elsewhere(self, func: Any) -> bool:
        """Return whether values decide about the shape of an op's results: boxes that are good enough, say."""
        return self._run.real and torch.Tag.dynamic_output_shape in func.tags

    def _difference(
        self, node: Node, flow: Flow, name: str, results: Sequence[Tensor], numbers: Sequence[float]
    ) -> str | None:
        if node.op != name and not {node.op, name} <= set(RESHAPES):
            return _ORDER
        if name == "_local_scalar_dense":
            return None
        outputs = flow.outputs
        if name in NORMS:  # their further results have whatever shape the device gives them
            results, outputs = results[:1], outputs[:1]
        if len(results) != len(outputs) or not all(map(self._fits, results, outputs)):
            return _SIZES
        if all(map(_equal, numbers, flow.numbers)):
            return None
        return None if self._scales is not None and _rescaled(node, numbers, flow, self._scales) else _NUMBER

    def _fits(self, result: Tensor, labels: Tensor | None) -> bool:
        if labels is None:  # a view of a parameter
            return True
        if id(labels) not in self._expected:
            self._expected[id(labels)] = self._foretold(labels)
        return tuple(result.shape) == self._expected[id(labels)]

    def _foretold(self, labels: Tensor) -> tuple[int, ...] | None:
        """Return the shape once only kept channels are left; None where what is left is no rectangle."""
        shape = list(labels.shape)
        moving = sorted(varying(labels))
        if not moving:
            return tuple(shape)
        small = compact(labels)
        stays = self._stays[ids(small)]
        if len(moving) == 1:
            shape[moving[0]] = int(np.count_nonzero(stays))
            return tuple(shape)
        stays = stays.reshape(small.shape)
        for d in moving:
            shape[d] = int(np.count_nonzero(stays.any(axis=tuple(i for i in moving if i != d))))
        return tuple(shape) if math.prod(shape[d] for d in moving) == np.count_nonzero(stays) else None


def _rescaled(node: Node, numbers: Sequence[float], flow: Flow, scales: dict[int, float]) -> bool:
    """Note by what a factor has changed; return whether the op multiplies by one."""
    if (
        node.op not in ("mul", "div")
        or len(numbers) != 1
        or len(flow.numbers) != 1
        or numbers[0] * flow.numbers[0] <= 0
    ):
        return False
    change = math.log(numbers[0] / flow.numbers[0])
    scales[node.index] = change if node.op == "mul" else -change
    return True


def _equal(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)
