"""The forwards of a network that are recorded: as it is used, on further examples, and in training.

Each runs on a copy of its own, so that what one run leaves behind (a cache, a counter) is not seen by the next. Copies
have no values; where a forward needs some, it runs on a real copy.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.errors import InputError, SurgeryError
from prunekit.surgery.copying import named_tensors
from prunekit.surgery.execution.dispatch import DispatchMode
from prunekit.surgery.execution.hooks import plain_calls, running
from prunekit.surgery.execution.outputs import tensors_of
from prunekit.surgery.execution.sources import Inputs, Source
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.recording import Pass, Recording
from prunekit.surgery.tracing.recorder import Recorder
from prunekit.surgery.tracing.rules import custom, elementwise

Shape = tuple[int, ...]

_log = logging.getLogger(__name__)


def record(source: Source, example: Inputs, further: Sequence[Inputs] = ()) -> tuple[Recording, Source]:
    """Record a network on the example, on further ones, and in training mode where parameters have not been seen yet.

    The first pass of the recording is that on `example`. A pass that fails in training counts as far as it came: some
    networks cannot be trained on such an input. Returns the source that could run the example.

    Raises:
        InputError: the forward fails on an example.
    """
    tensors = named_tensors(source.model)
    recording = Recording(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        frozenset(name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)),
    )
    source = _recorded(recording, source, example)
    for other in further:
        _recorded(recording, source, other)
    for inputs in (example, *further):
        if not recording.parameters <= recording.used:
            record_training(recording, source, inputs)
    return recording, source


def _recorded(recording: Recording, source: Source, example: Inputs) -> Source:
    """Record one pass in evaluation mode; return the source that could run it."""
    try:
        run(recording, source, example)
    except custom.RuleError:
        raise
    except Exception as error:  # whatever a stranger's forward raises without values, it may manage with them
        recording.passes.pop()
        if source.real:
            raise _refusal(example, error) from error
        _log.debug("recording on the meta device failed (%s); recording real tensors", error)
        return _recorded(recording, Source(source.model, real=True), example)
    return source


def _refusal(example: Inputs, error: Exception) -> InputError:
    shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(example) if isinstance(t, Tensor))
    return InputError(
        f"the model's forward fails on an input of shape {shapes}: {_one_line(error)}",
        hint="pass an example input that the model takes (x=..., or --input-size C,H,W)",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def record_training(recording: Recording, source: Source, example: Inputs) -> None:
    """Record the training mode too: auxiliary heads read pruned channels, but only run there."""
    for real in dict.fromkeys((source.real, True)):
        try:
            return run(recording, Source(source.model, real), twice(example), training=True)
        except Exception as error:  # it may need values, or a target; what ran so far still counts
            _log.debug("the training-mode pass stopped: %s", error)
    return None


def twice(example: Inputs) -> Inputs:
    """Return a batch of two where there was one: batch norms cannot be trained on a single value for each channel."""
    two: Inputs = tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t, example)
    return two


def run(recording: Recording, source: Source, example: Inputs, training: bool = False) -> None:
    """Record one forward as the next pass of `recording`."""
    subject, inputs = source.subject(training), source.inputs(example)
    modules, tensors = dict(subject.named_modules()), named_tensors(subject)
    recording.passes.append(Pass(example, training, source.real))
    for link in recording.links.values():  # a pass that failed may have left some
        link.reads.clear()
    values = dict(source.model.named_buffers())
    with running(modules) as stack, plain_calls(modules) as plain:
        recorder = Recorder(recording, tensors, custom.table(), elementwise.unknown, modules, stack, values)
        try:
            with recorder:
                output = source.run(subject, inputs)
        except Exception:
            recorder.settle_results(complete=False)
            raise
        recorder.freeze_output(output)
        recorder.settle_results(complete=True)
        recorder.settle_links()
    for name, once in plain.items():
        recording.plain[name] = once and recording.plain.get(name, True)
    recording.passes[-1].complete = True


def minds_training(model: nn.Module) -> bool:
    """Return whether code of the network's own, around layers, asks if it is in training mode."""
    return any(_asks(type(m).__mro__) and next(m.parameters(), None) is not None for m in model.modules())


@functools.cache
def _asks(kinds: tuple[type, ...]) -> bool:
    own = [vars(base) for base in kinds if not base.__module__.startswith(("torch.nn.", "builtins"))]
    return any(_names("training", value) for space in own for value in space.values())


def _names(word: str, value: Any) -> bool:
    """Return whether a function, or one inside it, mentions a word as a global name or attribute."""
    code = value if isinstance(value, CodeType) else getattr(value, "__code__", None)
    return code is not None and (word in code.co_names or any(_names(word, const) for const in code.co_consts))


def check_training(model: nn.Module, small: nn.Module, graph: Graph) -> None:
    """Ensure that `small` runs in training mode where `model` does, if the code asks for the mode at all.

    Raises:
        SurgeryError: it does not.
    """
    runs = [(run.example, run.real) for run in graph.further if run.training]
    if not runs and minds_training(model):
        runs = [(twice(graph.example), False)]
    for example, real in runs:
        has, wants = (training_run(Source(network, real), example) for network in (small, model))
        if isinstance(wants, list) and has != wants:
            reason = _one_line(has) if isinstance(has, Exception) else f"it returns {has}, not {wants}"
            raise SurgeryError(
                f"the pruned network does not run in training mode as the original does: {reason}",
                hint="the forward has sizes written into it that only training reads; compute them from the input",
            )


def training_run(source: Source, example: Inputs, subject: nn.Module | None = None) -> list[Shape] | Exception:
    """Return the shapes of what a network in training mode returns, or what it says instead.

    `subject` is a copy to run instead of the source's own.
    """
    try:
        subject, inputs = subject or source.subject(training=True), source.inputs(example)
        with DispatchMode():  # which knows short ways
            output = source.run(subject, inputs)
    except Exception as error:  # it may want values, or a target
        _log.debug("no run in training mode: %s", error)
        return error
    return [tuple(t.shape) for t in tensors_of(output).values()]
