"""Running ops on the meta device, where only shapes exist, without the detour that PyTorch takes for some of them.

PyTorch answers many ops there in Python, through `torch._dynamo`; importing that takes longer than most surgeries. The
common ones are answered here by a table; every other op goes the usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Args = tuple[Any, ...]


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that runs every op with `run_op`; subclasses look at what passes by."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        return run_op(func, args, kwargs or {})


def run_op(func: Any, args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Run an op, by the table where it has an answer."""
    if args and isinstance(args[0], Tensor) and args[0].is_meta and args[0].is_floating_point() and not kwargs:
        name = func._schema.name.removeprefix("aten::")
        answer = _TABLE.get(name.rstrip("_"))
        result = answer(args) if answer else None
        if result is not None:
            return args[0] if name.endswith("_") else result
    return func(*args, **kwargs)


def _like_input(args: Args) -> Tensor:
    return torch.empty_like(args[0])


def _binary(args: Args) -> Tensor | None:
    """The common case: the result is shaped and typed like the first operand."""
    x, other = args[0], args[1]
    if isinstance(other, int | float):
        return torch.empty_like(x)
    sizes = zip(reversed(other.shape), reversed(x.shape), strict=False)
    if other.dtype == x.dtype and other.dim() <= x.dim() and all(o in (1, n) for o, n in sizes):
        return torch.empty_like(x)
    return None


def _batch_norm(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)


def _mean(args: Args) -> Tensor | None:
    x, dims, keep = args[0], args[1] if len(args) > 1 else None, len(args) > 2 and args[2]
    if not dims:
        return None
    gone = {d % x.dim() for d in dims}
    result: Tensor = x.new_empty([1 if d in gone else size for d, size in enumerate(x.shape) if keep or d not in gone])
    return result


def _addmm(args: Args) -> Tensor:
    result: Tensor = args[0].new_empty(args[1].size(0), args[2].size(1))
    return result


def _mm(args: Args) -> Tensor:
    result: Tensor = args[0].new_empty(args[0].size(0), args[1].size(1))
    return result


_TABLE: Mapping[str, Callable[[Args], Any]] = {
    **dict.fromkeys(("relu", "silu", "gelu", "sigmoid", "tanh", "hardswish", "hardsigmoid"), _like_input),
    **dict.fromkeys(("hardtanh", "leaky_relu", "elu", "fill"), _like_input),
    **dict.fromkeys(("add", "sub", "mul", "div"), _binary),
    "native_batch_norm": _batch_norm,
    "mean": _mean,
    "addmm": _addmm,
    "mm": _mm,
}
