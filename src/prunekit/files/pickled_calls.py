"""Table of the calls that a pickle of tensors may make, each with a check that the file holds what it would build."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Global:
    """A name that the pickle imports."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The bytes behind tensors, `numel` elements of them."""

    key: str
    numel: int
    itemsize: int


class Unknown:
    """Result of a call on which nothing further depends."""


class Keys(list[Any]):
    """Mapping of which only the keys matter."""


class BadPickleError(Exception):
    """Error that names something no file of tensors contains."""


def check_call(name: str, arguments: tuple[Any, ...]) -> None:
    """Raise `BadPickleError` unless the call is in the table and the file holds what it would build."""
    if name not in _CALLS:
        raise BadPickleError(f"{name}({', '.join(map(_short, arguments))})")
    if not _CALLS[name](*arguments):
        raise BadPickleError(f"{name} of what the file does not hold")


def trusted() -> set[str]:
    """Return the dotted names that the calling program has told torch to trust."""
    found = [item[0] if isinstance(item, tuple) else item for item in torch.serialization.get_safe_globals()]
    return {f"{item.__module__}.{item.__qualname__}" for item in found if hasattr(item, "__qualname__")}


def _short(item: Any) -> str:
    return str(item) if isinstance(item, int | float) else type(item).__name__.lower()


def is_key(value: Any) -> bool:
    """Return whether a value is plain or a tuple of plain values.

    Nested tuples are refused: a tuple that holds another twice, some levels deep, takes forever to hash.
    """
    parts = value if isinstance(value, tuple) else (value,)
    return all(part is None or isinstance(part, str | int | float | Global) for part in parts)


def adds_to(kind: type, state: Any) -> bool:
    """Return whether `state` holds only attributes that objects of type `kind` do not have already."""
    return isinstance(state, Keys) and all(isinstance(key, str) and not hasattr(kind, key) for key in state)


def storage_of(pid: Any) -> Storage:
    """Return the storage that a persistent id describes; raise `ValueError` for anything else."""
    kind, storage, key, _, numel, *view = pid
    if kind != "storage" or not isinstance(storage, Global) or not isinstance(key, str) or not _is_count(numel):
        raise ValueError("no storage")
    name = storage.name.rpartition(".")[2].removesuffix("Storage")
    if view not in ([], [None]):
        raise ValueError("a storage that is part of another")
    return Storage(key, numel, _ITEM_SIZES[name])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _fits(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> bool:
    """Return whether a tensor's last element lies in its storage; repeating by a stride of zero allocates nothing."""
    if not isinstance(storage, Storage) or not all(isinstance(numbers, tuple) for numbers in (size, stride)):
        return False
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS or not all(map(_is_count, (offset, *size, *stride))):
        return False
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return 0 in size or offset + last < storage.numel


def _is_backed(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> bool:
    """Return whether the tensor fits and the storage holds at least as many elements."""
    return _fits(storage, offset, size, stride) and math.prod(size) <= storage.numel


def _rebuilt(build: Any, _: Any, arguments: Any, state: Any) -> bool:
    """Check a tensor that is rebuilt with further attributes."""
    check_call(build.name, arguments)
    return _are_attributes(state)


def _are_attributes(state: Any) -> bool:
    """Return whether `state` is None, a dict, or the pair of both kinds of attributes that Python knows."""
    parts = state if isinstance(state, tuple) else (state,)
    return all(part is None or adds_to(Tensor, part) for part in parts)


def _are_keys(*given: Any) -> bool:
    """Return whether the arguments are empty, a mapping, or a list of keys or pairs."""
    if not given or isinstance(given[0], Keys):
        return True
    return isinstance(given[0], list) and all(is_key(item[0] if isinstance(item, list) else item) for item in given[0])


def _are(*kinds: type) -> Callable[..., bool]:
    return lambda *given: all(type(item) in kinds for item in given)


def _is_bytes(*given: Any) -> bool:
    """Return whether the arguments are bytes as protocol 2 writes them: text of the first 256 characters."""
    return not given or (isinstance(given[0], str | Unknown) and given[1:] in ((), ("latin1",), ("latin-1",)))


def _are_sizes(*given: Any) -> bool:
    return all(isinstance(sizes, tuple | list) and all(map(_is_count, sizes)) for sizes in given)


# Bytes per element, by the beginning of the storage's name; newer dtypes lie in untyped storages.
_ITEM_SIZES = {
    **dict.fromkeys(("Untyped", "Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
MAPPINGS = ("collections.OrderedDict", "collections.Counter", "builtins.set", "__builtin__.set")
_CALLS: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(MAPPINGS, _are_keys),
    **{f"torch._utils._rebuild_tensor{version}": _fits for version in ("", "_v2", "_v3")},
    "torch._utils._rebuild_qtensor": _is_backed,
    "torch._utils._rebuild_parameter": lambda *_: True,
    "torch._utils._rebuild_parameter_with_state": lambda *given: _are_attributes(given[-1]),
    "torch._utils._rebuild_sparse_tensor": lambda *_: True,
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: True,
    "torch._tensor._rebuild_from_type_v2": _rebuilt,
    "torch.Size": _are_sizes,
    "torch.device": _are(str, int),
    "torch.serialization._get_layout": _are(str),
    **dict.fromkeys(("builtins.complex", "__builtin__.complex"), _are(int, float)),
    **dict.fromkeys(("builtins.bytearray", "__builtin__.bytearray", "_codecs.encode"), _is_bytes),
}
