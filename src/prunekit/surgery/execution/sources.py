"""Inputs as a forward takes them, and the copies of a network that are run to be watched.

Copies have no values; where a forward needs some, it runs on a real copy.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map

from prunekit.devices import device_of, forked_generators
from prunekit.errors import InputError
from prunekit.nn.attention import free_all
from prunekit.surgery.copying import copied, named_tensors
from prunekit.surgery.execution.dispatch import like_input, unfused_attention

Inputs = tuple[Any, ...]


def as_inputs(x: Any) -> Inputs:
    """Return an example input as a tuple of positional arguments."""
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def random_inputs(
    example: tuple[Any, ...], device: torch.device, seed: int, batch: int | None = None
) -> tuple[Any, ...]:
    """Return standard normal inputs shaped like `example` (zeros where they are integers), `batch` of them if given."""
    generator = torch.Generator().manual_seed(seed)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = leaf.shape if batch is None or not leaf.dim() else (batch, *leaf.shape[1:])
        if leaf.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, leaf.dtype)
        return torch.zeros(shape, dtype=leaf.dtype, device=device)

    filled: tuple[Any, ...] = tree_map(fill, example)
    return filled


def bound_inputs(model: nn.Module, x: Any) -> Inputs:
    """Return an example input as the tuple of positional arguments of the model's forward.

    `x` is one argument, or a tuple or list of them; a dictionary whose keys are names of the forward's arguments gives
    them by name.

    Raises:
        InputError: a dictionary that leaves an argument out, or names one that can only be given by name.
    """
    if not isinstance(x, Mapping):
        return as_inputs(x)
    signature = inspect.signature(model.forward)
    if not x or not x.keys() <= signature.parameters.keys():
        return (x,)
    try:
        bound = signature.bind(**x)
    except TypeError as error:
        raise InputError(f"the example does not fit the model's forward: {error}") from error
    if bound.kwargs:
        raise InputError(f"the example gives '{next(iter(bound.kwargs))}', which the forward takes by name alone")
    bound.apply_defaults()
    return bound.args


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of the network on the meta device: the same modules and shapes, no memory."""
    replaced: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        bare = like_input(tensor)
        if isinstance(tensor, nn.Parameter):
            bare = nn.Parameter(bare, requires_grad=tensor.requires_grad)
        replaced[id(tensor)] = bare
    return copied(model, replaced)


def to_meta(inputs: Inputs) -> Inputs:
    """Return the same inputs without their values."""
    moved: Inputs = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, inputs)
    return moved


@dataclass(frozen=True)
class Source:
    """The network that is recorded; `real` where its forward needs values."""

    model: nn.Module
    real: bool = False

    def subject(self, training: bool = False) -> nn.Module:
        """Return a copy that has not run yet, with heads of attention freed of the embedding's width.

        Dropout, which has no say in widths, stays off in training.
        """
        fresh = (copied(self.model) if self.real else skeleton(self.model)).train(training)
        free_all(fresh)
        for module in fresh.modules() if training else ():
            if isinstance(module, _DropoutNd):
                module.eval()
        return fresh

    def inputs(self, example: Inputs) -> Inputs:
        """Return an example as the subject takes it."""
        if not self.real:
            return to_meta(example)
        device = device_of(self.model)
        moved: Inputs = tree_map(lambda t: _with_values(t).to(device) if isinstance(t, Tensor) else t, example)
        return moved

    def run(self, subject: nn.Module, example: Inputs) -> Any:
        """Return the subject's output; the caller's random numbers are left alone."""
        with forked_generators(device_of(subject)) if self.real else contextlib.nullcontext():
            return subject(*example)


def _with_values(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor


@contextlib.contextmanager
def transparent() -> Iterator[None]:
    """Switch off what hides ops from a dispatch mode: inference mode, and the fused path of transformer layers."""
    with unfused_attention(), torch.inference_mode(False), torch.no_grad():
        yield
