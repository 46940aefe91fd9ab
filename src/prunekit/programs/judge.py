"""Bound the memory that an exported program would allocate, on the meta device before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import InputError
from prunekit.programs.arguments import CHECKS
from prunekit.programs.steps import Step, names
from prunekit.surgery.execution.dispatch import DispatchMode

# Bytes that any program may hold at once, and the factor for the size of its file and its user's inputs.
_FREE = 1 << 30
_TIMES_HELD = 512

# An operator makes at most this many numbers plus this multiple of those that it reads.
_FREE_NUMBERS = 1 << 24
_GROWTH = 64


_META = torch.device("meta")


class ExcessError(InputError):
    """Error for a program that asks for more memory than its weights and inputs justify."""

    def __init__(self, what: str) -> None:
        super().__init__(f"its program asks for {what}, more than its weights and inputs justify")


def judge(
    steps: Iterable[Step],
    values: Mapping[str, Tensor],
    layers: Callable[[str], Callable[..., Any]],
    held: int,
) -> None:
    """Run the steps on meta tensors by name, and stop as soon as one asks for too much.

    Args:
        steps: The steps of the program, in order.
        values: Meta tensors of the inputs and weights, by name.
        layers: Finds the layer of a step by its name.
        held: The bytes that the file and its user's inputs hold.

    Raises:
        ExcessError: A step asks for too much. Errors of operators pass through.
    """
    alive: dict[str, Any] = dict(values)
    sizes: dict[str, int] = {}
    allowed = _FREE + _TIMES_HELD * held
    with torch.no_grad(), _Bounded(allowed):
        for step in steps:
            if isinstance(step.call, torch._ops.OpOverload) and not step.layer:
                _check_arguments(step.call, *step.arguments(alive, _META))
            step.run(alive, _META, layers)
            for name in names(step.results):
                sizes[name] = sum(map(_bytes, _tensors([alive.get(name)])))
            for name in step.release:
                sizes.pop(name, None)
            if sum(sizes.values()) > allowed:
                raise ExcessError(f"{sum(sizes.values())} bytes at once, where {held} are held")


def twin(tensor: Tensor) -> Tensor:
    """Return a meta tensor of the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Bounded(DispatchMode):
    """Checks the arguments and results of every operator into which a composite one decomposes."""

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self._allowed = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator between the checks."""
        given = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        operands = list(_tensors((*args, *given.values())))
        if not operands and any(argument.name == "device" for argument in func._schema.arguments):
            given["device"] = _META  # tensors made from no tensor would otherwise be allocated for real
        _check_arguments(func, args, given)
        outcome = func(*args, **given)
        self._check(name, operands, list(_tensors((outcome,))))
        return outcome

    def _check(self, name: str, operands: list[Tensor], results: list[Tensor]) -> None:
        # a matrix product has at most as many numbers as one factor times a dimension of the other
        widest = max((size for tensor in operands for size in tensor.shape), default=0)
        most = _FREE_NUMBERS + max(_GROWTH, widest) * sum(tensor.numel() for tensor in operands)
        for tensor in results:
            if tensor.numel() > most or _bytes(tensor) > self._allowed:
                raise ExcessError(f"{name} with a result of {'x'.join(map(str, tensor.shape))}")


def _check_arguments(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    name = func._schema.name.removeprefix("aten::")
    if name in CHECKS:
        defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
        problem = CHECKS[name](defaults | dict(zip(defaults, args, strict=False)) | dict(kwargs))
        if problem:
            raise ExcessError(f"{name} with {problem}")


def _bytes(tensor: Tensor) -> int:
    return max(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
