"""What running an exported program would allocate, found on the meta device before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import InputError
from prunekit.programs.arguments import CHECKS
from prunekit.programs.steps import Step, names
from prunekit.surgery.execution.dispatch import DispatchMode

# Bytes that any program may hold at once, and how many times what its file and its user's inputs hold are added.
_FREE = 1 << 30
_TIMES_HELD = 512

# One operator makes no more numbers than this and so many times those that it reads.
_FREE_NUMBERS = 1 << 24
_GROWTH = 64


_META = torch.device("meta")


class ExcessError(InputError):
    """The program asks for more than its weights and inputs justify."""

    def __init__(self, what: str) -> None:
        super().__init__(f"its program asks for {what}, more than its weights and inputs justify")


def judge(
    steps: Iterable[Step],
    values: Mapping[str, Tensor],
    layers: Callable[[str], Callable[..., Any]],
    held: int,
) -> None:
    """Run the steps on meta tensors by name, and raise `ExcessError` as soon as one asks for too much.

    `held` is how many bytes the file and its user's inputs hold. Raises whatever operators raise, too.
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
    """A meta tensor of the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Bounded(DispatchMode):
    """Checks the arguments and the results of every operator that a composite one falls into."""

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self._allowed = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it between the checks."""
        given = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        operands = list(_tensors((*args, *given.values())))
        if not operands and any(argument.name == "device" for argument in func._schema.arguments):
            given["device"] = _META  # what is made from nothing is else made in earnest
        _check_arguments(func, args, given)
        outcome = func(*args, **given)
        self._check(name, operands, list(_tensors((outcome,))))
        return outcome

    def _check(self, name: str, operands: list[Tensor], results: list[Tensor]) -> None:
        # a product of two tensors has at most as many numbers as one of them times a dimension of the other
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
