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
    first = args[0][0] if args and isinstance(args[0], list) and args[0] else args[0] if args else None
    if isinstance(first, Tensor) and first.is_meta and first.is_floating_point() and not kwargs:
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


def _layer_norm(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)


def _binary_of_two(args: Args) -> Tensor | None:
    """`_binary`, and two tensors of one type that broadcast to a third shape."""
    result = _binary(args)
    if result is None and args[0].dtype == args[1].dtype:
        shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
        result = torch.empty(shape, dtype=args[0].dtype, device="meta")
    return result


def _cat(args: Args) -> Tensor | None:
    parts = args[0]
    dim = (args[1] if len(args) > 1 else 0) % parts[0].dim()
    if any(part.dim() != parts[0].dim() or part.dtype != parts[0].dtype for part in parts):
        return None
    shape = list(parts[0].shape)
    for part in parts[1:]:
        if any(n != m for d, (n, m) in enumerate(zip(part.shape, shape, strict=True)) if d != dim):
            return None  # the usual way says what is wrong
    shape[dim] = sum(part.size(dim) for part in parts)
    result: Tensor = parts[0].new_empty(shape)
    return result


def _norm(args: Args) -> Tensor | None:
    return _mean((args[0], *args[2:4]))


_TABLE: Mapping[str, Callable[[Args], Any]] = {
    **dict.fromkeys(("relu", "silu", "gelu", "sigmoid", "tanh", "hardswish", "hardsigmoid"), _like_input),
    **dict.fromkeys(("hardtanh", "leaky_relu", "elu", "fill", "clamp", "clamp_min", "roll"), _like_input),
    **dict.fromkeys(("_softmax", "_safe_softmax"), _like_input),
    **dict.fromkeys(("add", "sub", "mul", "div"), _binary_of_two),
    "cat": _cat,
    "linalg_vector_norm": _norm,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "mean": _mean,
    "addmm": _addmm,
    "mm": _mm,
}
