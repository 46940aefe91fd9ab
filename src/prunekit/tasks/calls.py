"""Calls of a task's code, and of a network by it: what comes back is checked, and errors are explained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError, PrunekitError, TrainingError
from prunekit.models import told
from prunekit.tasks.advice import advice
from prunekit.tasks.base import Batch, Task
from prunekit.tasks.nests import described


class Heard:
    """A network that is listened to in a `with`: the output of its last call, and whether a call has failed."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.output: Any = None
        self.inside: Any = None

    def __enter__(self) -> Heard:
        before = self._network.register_forward_pre_hook(self._begins, with_kwargs=True)
        self._hooks = (before, self._network.register_forward_hook(self._ends))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begins(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.inside = (args, kwargs)

    def _ends(self, _: nn.Module, __: Any, output: Any) -> None:
        self.inside, self.output = None, output


def loss_of(task: Task, network: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
    """Return the task's loss on a batch, and the output of the network in its last call.

    Raises:
        TrainingError: The loss is no single number, or the network or the task fails.
    """
    heard = Heard(network)
    try:
        with heard:
            loss = task.loss(network, batch)
    except PrunekitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _failed(task, heard, error) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        found = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)[:60]
        raise TrainingError(
            f"the loss of the task {task.name} is {found}, expected one floating-point number",
            hint="loss(model, batch) returns a tensor without dimensions; average over the batch with .mean()",
        )
    return loss.reshape(()), heard.output


def scores_of(task: Task, network: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
    """Return the task's scores, with the one that counts among them.

    Raises:
        InputError: It is not among them, or no finite number, or the network or the task fails.
    """
    scores = named_scores(task, network, batches)
    found = scores[task.score]
    if not math.isfinite(found):
        raise InputError(
            f"the score '{task.score}' of the task {task.name} is {found}",
            hint="look for a division by zero in scores(model, batches), or for outputs that are no numbers",
        )
    return scores


def named_scores(task: Task, network: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
    """Return the task's scores, with the one that counts among them, finite or not; raise as `scores_of` does."""
    metric, heard = task.metric, Heard(network)
    try:
        with heard, torch.no_grad():
            found = task.scores(network, batches)
    except PrunekitError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise InputError("out of memory", hint="try a smaller --batch-size") from None
        failed = _failed(task, heard, error)
        raise InputError(failed.message, hint=failed.hint) from error
    if not isinstance(found, Mapping) or metric.name not in found:
        what = ", ".join(map(str, found)) or "nothing" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise InputError(
            f"the task {task.name} is scored by '{metric.name}', and its scores are: {what}",
            hint="scores(model, batches) returns a dictionary with the name in the attribute `score`",
        )
    return {str(name): _number(task, name, value) for name, value in found.items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory has run out, on any device."""
    # On the CPU the allocator has no error class of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _number(task: Task, name: object, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"the score '{name}' of the task {task.name} is a {type(value).__name__}, expected a number"
        ) from None


def _failed(task: Task, heard: Heard, error: Exception) -> TrainingError:
    """Return the error for a failure of the network, or of the task's own code."""
    if heard.inside is None:
        return TrainingError(f"the code of the task {task.name} failed: {told(error)}")
    return network_failed(heard.inside[0], error)


def network_failed(inputs: Any, error: Exception) -> TrainingError:
    """Return the error for a network that fails on inputs, with advice on the usual ones."""
    return TrainingError(
        f"the network failed on a batch of shape {described(inputs)}: {told(error)}", hint=advice(error)
    )
