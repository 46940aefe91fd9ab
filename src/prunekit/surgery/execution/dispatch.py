"""Running ops on the meta device, where only shapes exist, without the detours that PyTorch takes there.

PyTorch answers many ops there in Python, some through `torch._dynamo`, whose import alone takes longer than most
surgeries; even `empty_like` takes forty times as long as `empty`. The common ones are answered here by a table; every
other op, and every case that the table does not cover, goes the usual way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.surgery.ops import ZERO_ACTIVATIONS

Args = tuple[Any, ...]
Answer = Callable[..., Any]

_META = torch.device("meta")


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


@contextlib.contextmanager
def unfused_attention() -> Iterator[None]:
    """Switch off the fused inference path of transformer layers, which hides their ops from dispatch modes."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@functools.cache
def op_name(func: Any) -> str:
    """Return the name of an op, the same for its variants: `add` for `aten::add_.Tensor`."""
    return str(func._schema.name).removeprefix("aten::").rstrip("_")


def run_op(func: Any, args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Run an op, by the table where it has an answer."""
    answer, in_place = _answer(func)
    if answer is not None and not kwargs:
        first = args[0][0] if isinstance(args[0], list) and args[0] else args[0]
        if isinstance(first, Tensor) and first.is_meta and first.is_floating_point():
            result = answer(*args)
            if result is not None and not in_place:
                return result
            if result is not None and result.shape == first.shape:
                return first
    return func(*args, **kwargs)


@functools.cache
def _answer(func: Any) -> tuple[Answer | None, bool]:
    """Return the tables' answer for an op, and whether the op works in place."""
    in_place = func._schema.name.endswith("_")
    return _TABLE.get(op_name(func)) or (None if in_place else _VIEWS.get(op_name(func))), in_place


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return a contiguous tensor without values, of the type of another one."""
    return torch.empty(shape, dtype=like.dtype, device=_META)


def like_input(x: Tensor, *_: Any) -> Tensor:
    """Return an empty tensor of the shape of `x`, with the dimensions in the same order in memory."""
    if x.is_contiguous():
        return empty(x.shape, x)
    strides = x.stride()
    if 0 in strides:
        return torch.empty_like(x, device=_META)
    order = sorted(range(x.dim()), key=strides.__getitem__, reverse=True)
    return torch.empty_permuted(x.shape, order, dtype=x.dtype, device=_META)


def _binary(x: Tensor, other: Any, *_: Any) -> Tensor | None:
    """Return the result of operands of one type that broadcast; it lies in memory as the larger of them does."""
    if isinstance(other, int | float):
        return like_input(x)
    if not isinstance(other, Tensor) or other.dtype != x.dtype:
        return None
    shape = broadcast(x.shape, other.shape)
    if shape is None:
        return None
    if shape == x.shape:
        return like_input(x)
    return like_input(other) if shape == other.shape else empty(shape, x)


def broadcast(a: Sequence[int], b: Sequence[int]) -> Sequence[int] | None:
    """Return the shape that two shapes broadcast to, or None where they do not fit."""
    if a == b:
        return a
    rank = max(len(a), len(b))
    pairs = list(zip((1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b), strict=True))
    if any(n != m and n != 1 and m != 1 for n, m in pairs):
        return None
    return torch.Size([m if n == 1 else n for n, m in pairs])


def _masked_fill(x: Tensor, mask: Tensor, _: Any) -> Tensor | None:
    return like_input(x) if broadcast(x.shape, mask.shape) == x.shape else None


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rows that are looked up by number."""
    rows = indices[0]
    if len(indices) != 1 or rows is None or rows.dtype != torch.int64:
        return None
    return empty((*rows.shape, *x.shape[1:]), x)


def _batch_norm(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    if any(t is not None and t.numel() != x.size(1) for t in settings[:4]):
        return None  # the usual way says what is wrong
    return like_input(x), empty((0,), x), empty((0,), x)


def _convolution(x: Tensor, weight: Tensor, *settings: Any) -> Tensor | None:
    """Return the result of a plain convolution of plain tensors; what does not fit gets its message the usual way."""
    _, stride, padding, dilation, transposed, _, groups = settings
    order = _memory_order(x, weight)
    if transposed or order is None or x.dtype != weight.dtype or x.dim() != weight.dim():
        return None
    if x.size(1) != weight.size(1) * groups or weight.size(0) % groups:
        return None
    geometry = zip(x.shape[2:], weight.shape[2:], *(_each(x, s) for s in (stride, padding, dilation)), strict=True)
    sizes = [(n + 2 * pad - gap * (k - 1) - 1) // step + 1 for n, k, step, pad, gap in geometry]
    if any(size < 1 for size in sizes):
        return None
    shape = (x.size(0), weight.size(0), *sizes)
    return torch.empty(shape, dtype=x.dtype, device=_META, memory_format=order)


def _memory_order(x: Tensor, weight: Tensor) -> torch.memory_format | None:
    """Return the memory layout of a convolution's result: that of its input, where this is one of the usual ones."""
    if x.is_contiguous() and weight.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def _each(x: Tensor, setting: Sequence[int]) -> Sequence[int]:
    """Return a setting for each spatial dimension."""
    return setting if len(setting) > 1 else [*setting] * (x.dim() - 2)


def _mean(x: Tensor, dims: Sequence[int] | None = None, keep: bool = False, *_: Any) -> Tensor | None:
    if not dims:
        return None
    gone = {d % x.dim() for d in dims}
    return empty([1 if d in gone else size for d, size in enumerate(x.shape) if keep or d not in gone], x)


def _norm(x: Tensor, _: Any = 2, dims: Sequence[int] | None = None, keep: bool = False, *__: Any) -> Tensor | None:
    return _mean(x, dims, keep)


def _addmm(bias: Tensor, x: Tensor, matrix: Tensor) -> Tensor | None:
    return _mm(x, matrix) if bias.shape == matrix.shape[1:] else None


def _mm(x: Tensor, matrix: Tensor) -> Tensor | None:
    return empty((x.size(0), matrix.size(1)), x) if x.size(1) == matrix.size(0) else None


def _bmm(a: Tensor, b: Tensor) -> Tensor | None:
    fits = a.size(0) == b.size(0) and a.size(2) == b.size(1)
    return empty((a.size(0), a.size(1), b.size(2)), a) if fits else None


def _layer_norm(x: Tensor, shape: Sequence[int], *_: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    if list(x.shape[x.dim() - len(shape) :]) != list(shape):
        return None
    return empty(x.shape, x), empty((0,), x), empty((0,), x)


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first, dim = parts[0], dim % parts[0].dim()
    shape = list(first.shape)
    for part in parts[1:]:
        if part.dim() != first.dim() or part.dtype != first.dtype:
            return None
        if part.shape[:dim] != first.shape[:dim] or part.shape[dim + 1 :] != first.shape[dim + 1 :]:
            return None  # the usual way says what is wrong
        shape[dim] += part.size(dim)
    return empty(shape, first)


_SAME_SHAPE = (
    *(*ZERO_ACTIVATIONS, "sigmoid", "hardsigmoid", "exp"),
    *("fill", "clamp", "clamp_min", "roll", "_softmax", "_safe_softmax"),
)

_TABLE: Mapping[str, Answer] = {
    **dict.fromkeys(_SAME_SHAPE, like_input),
    **dict.fromkeys(("add", "sub", "mul", "div"), _binary),
    "masked_fill": _masked_fill,
    "index": _index,
    "cat": _cat,
    "linalg_vector_norm": _norm,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "convolution": _convolution,
    "mean": _mean,
    "addmm": _addmm,
    "mm": _mm,
    "bmm": _bmm,
}

_VIEWS: Mapping[str, Answer] = {
    **dict.fromkeys(("view", "_unsafe_view"), Tensor.view),
    "permute": torch.permute,
    "transpose": torch.transpose,
    "t": torch.t,
    "unsqueeze": torch.unsqueeze,
}
