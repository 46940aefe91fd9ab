"""Common parts of the functions of the Python face: unwrap networks, find example inputs, explain failures."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunekit import surgery
from prunekit.devices import check_whole, device_of, has_double
from prunekit.errors import InputError, PrunekitError, SurgeryError
from prunekit.plan import Plan
from prunekit.spec import origin_of
from prunekit.surgery import Graph
from prunekit.surgery.copying import copied
from prunekit.surgery.editing.reparametrised import Result
from prunekit.surgery.tracing.tracer import example_of


@dataclass(frozen=True)
class Subject:
    """A network, out of its wrappers, and the same one with plain weights where it computes them.

    Both are on the CPU where their own device, `home`, has no float64: what makes up for channels is computed in it.
    """

    model: nn.Module
    plain: nn.Module
    home: torch.device

    @classmethod
    def of(cls, model: nn.Module) -> Subject:
        home, model = device_of(model), precise(surgery.unwrapped(model))
        return cls(model, surgery.materialised(model), home)

    def proven(self, plan: Plan, graph: Graph) -> tuple[Result, float, float]:
        """Return the pruned network, the largest difference in its proof, and when that began."""
        result = surgery.pruned(self.model, self.plain, plan, graph)
        edited = time.perf_counter()
        difference = surgery.verify(self.plain, result.plain, plan, graph)
        if result.left:
            names = ", ".join(result.left)
            warnings.warn(
                f"plain weights now, since their parametrisation does not hold for fewer channels: {names}",
                stacklevel=4,
            )
        result.model.to(self.home)
        return result, difference, edited


def precise(model: nn.Module) -> nn.Module:
    """Return the network, or a copy on the CPU where its device has no float64."""
    device = device_of(model)
    return model if device.type == "meta" or has_double(device) else copied(model).cpu()


@contextlib.contextmanager
def at_work(model: nn.Module, x: Any) -> Iterator[None]:
    """Run without compilation and inference mode, and explain some failures.

    An exported program may be refused where its network is not, and a forward may fail on the type of `x`.
    """
    from prunekit.programs.program import ExportedProgram

    check_whole(model)
    try:
        with surgery.uncompiled(), torch.inference_mode(False):
            yield
    except (InputError, SurgeryError, RuntimeError) as error:
        if isinstance(model, ExportedProgram) and isinstance(error, PrunekitError):
            error.hint = (
                "an exported program has sizes written into it; the checkpoint with its architecture (--arch) may be "
                "pruned where it cannot"
            )
        elif isinstance(error, RuntimeError) or error.__cause__ is not None:  # the forward has failed
            surgery.check_types(model, x)
        raise


def warn_of_unseen(graph: Graph) -> None:
    """Say what no example has reached: what it reads may be gone."""
    names, more = ", ".join(graph.never_ran[:5]), len(graph.never_ran) - 5
    if names:
        text = f"never ran on the example input: {names}{f' and {more} more' if more > 0 else ''}"
        warnings.warn(f"{text}; what they read may be gone (examples=[...] can reach them)", stacklevel=3)


def plain_examples(examples: Iterable[Any]) -> list[Any]:
    """Return further example inputs as tensors of no special kind; see `surgery.plain_example`."""
    return [surgery.plain_example(one) for one in examples]


def example_input(model: nn.Module, x: Any, plan: Plan | None = None) -> Any:
    """Return the example input: as given, or as the plan or the model remembers it."""
    from prunekit.programs.program import filled

    if x is not None:
        return surgery.plain_example(x)
    if plan is not None and plan.example:
        return tuple(example_of(model, shape) for shape in plan.example)
    origin = origin_of(model)
    if origin is None or origin.input is None:
        raise InputError("an example input is needed: this model does not say what it reads", hint="pass x=...")
    return filled(model, example_of(model, (1, *origin.input.shape)))
