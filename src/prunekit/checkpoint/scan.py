"""Pickles of tensors, followed before they are loaded: what they build is bounded by what the file holds.

`torch.load(weights_only=True)` runs no code of the file's, yet allocates whatever size it names: a bytearray, a
storage, a tensor class that is called with a number. This walk over the same opcodes knows what each call would
allocate.
"""

from __future__ import annotations

import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prunekit.errors import InputError

# Bytes of one pickle, without its tensors; the longest histories of training runs are far shorter.
_LONGEST = 1 << 24
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
    """What a call gives, where nothing further depends on it."""


class Keys(list[Any]):
    """A mapping, of which the keys alone matter."""


class _BadPickleError(Exception):
    """Says what no file of tensors has."""


def check(stream: BinaryIO, name: str, sizes: Mapping[str, int] | None, *, pickles: int = 1) -> None:
    """Follow `pickles` pickles from where the stream stands.

    `sizes` gives the bytes of each storage by its key; without it, all storages together are bounded by the stream.

    Raises:
        InputError: a pickle that would allocate more than the file holds, or call what state dicts need not.
    """
    start = stream.tell()
    held = stream.seek(0, 2)
    stream.seek(start)
    storages: dict[str, int] = {}
    try:
        for _ in range(pickles):
            for storage in _Walk(stream).storages():
                storages[storage.key] = max(storage.numel * storage.itemsize, storages.get(storage.key, 0))
        for key, claimed in storages.items():
            if sizes is not None and claimed != sizes.get(key):
                raise _BadPickleError(f"a storage of {claimed} bytes, where {sizes.get(key, 0)} are held")
        if sizes is None and sum(storages.values()) > held:
            raise _BadPickleError(f"storages of {sum(storages.values())} bytes in a file of {held}")
    except _BadPickleError as error:
        raise InputError(f"{name} is refused: its pickle asks for {error}") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{name} is damaged or truncated: no valid pickle of tensors") from error


class _Walk:
    """The stack machine of pickles, over constants, containers without content, and `Global`, `Storage`, `Unknown`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def storages(self) -> Iterator[Storage]:
        """Run to the end; give every storage on the way."""
        for opcode, argument, position in pickletools.genops(self._stream):
            if position is not None and position > _LONGEST:
                raise _BadPickleError(f"more than {_LONGEST} bytes besides its tensors")
            if opcode.name == "BINPERSID":
                self._stack[-1] = _storage(self._stack[-1])
                yield self._stack[-1]
            elif opcode.name in _PUSHED:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            else:
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise ValueError(f"{opcode.name} is none of the opcodes of state dicts")
                step(self, argument)

    def mark(self, _: Any) -> None:
        """Begin a group of values."""
        self._marks.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def imports(self, argument: str) -> None:
        """A name of a module and of something in it."""
        self._stack.append(Global(argument.replace(" ", ".", 1)))

    def put(self, index: int) -> None:
        """Note the top of the stack."""
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        """What was noted."""
        self._stack.append(self._memo[index])

    def tuple_of(self, count: int) -> None:
        """The last `count` values as a tuple."""
        if len(self._stack) < count:
            raise ValueError("a tuple of less")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def tuple_marked(self, _: Any) -> None:
        """The values since the mark as a tuple."""
        items = self._marked()
        self._stack.append(tuple(items))

    def append(self, _: Any) -> None:
        """One more in a list."""
        item = self._stack.pop()
        self._stack[-1].append(item)

    def extend(self, _: Any) -> None:
        """More in a list."""
        items = self._marked()
        self._stack[-1].extend(items)

    def set_item(self, _: Any) -> None:
        """An entry of a mapping."""
        self._stack.pop()
        self._note([self._stack.pop()])

    def set_items(self, _: Any) -> None:
        """Entries of a mapping."""
        self._note(self._marked()[::2])

    def _note(self, keys: list[Any]) -> None:
        if not isinstance(self._stack[-1], Keys):
            raise ValueError("an entry of what is no mapping")
        if not all(map(_is_key, keys)):
            raise _BadPickleError("a dict with a key that is no plain value")
        self._stack[-1].extend(keys)

    def call(self, _: Any) -> None:
        """A name called with arguments: only those of the table, each with its own check."""
        arguments, called = self._stack.pop(), self._stack[-1]
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no name")
        if called.name not in _trusted():
            _check_call(called.name, arguments)
        self._stack[-1] = Keys() if called.name in _MAPPINGS else Unknown()

    def build(self, _: Any) -> None:
        """The state of an object: further attributes of a mapping."""
        state = self._stack.pop()
        if isinstance(self._stack[-1], Keys) and not _adds(OrderedDict, state):
            raise _BadPickleError("a dict whose methods are others")
        if not isinstance(self._stack[-1], Keys | Unknown):
            raise ValueError("a state of what has none")


def _check_call(name: str, arguments: tuple[Any, ...]) -> None:
    if name not in _CALLS:
        raise _BadPickleError(f"{name}({', '.join(map(_short, arguments))})")
    if not _CALLS[name](*arguments):
        raise _BadPickleError(f"{name} of what the file does not hold")


def _nothing(_: _Walk, __: Any) -> None:
    return


_PUSHED = frozenset({"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"})
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": Keys,
    "EMPTY_SET": Keys,
}
_STEPS: dict[str, Callable[[_Walk, Any], None]] = {
    **dict.fromkeys(("PROTO", "STOP"), _nothing),
    "MARK": _Walk.mark,
    "GLOBAL": _Walk.imports,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Walk.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Walk.get),
    **{f"TUPLE{count}": lambda walk, _, count=count: walk.tuple_of(count) for count in (1, 2, 3)},
    "TUPLE": _Walk.tuple_marked,
    "APPEND": _Walk.append,
    "APPENDS": _Walk.extend,
    "SETITEM": _Walk.set_item,
    "SETITEMS": _Walk.set_items,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Walk.call),
    "BUILD": _Walk.build,
}


def _trusted() -> set[str]:
    """What the calling program has told torch to trust."""
    found = [item[0] if isinstance(item, tuple) else item for item in torch.serialization.get_safe_globals()]
    return {f"{item.__module__}.{item.__qualname__}" for item in found if hasattr(item, "__qualname__")}


def _short(item: Any) -> str:
    return str(item) if isinstance(item, int | float) else type(item).__name__.lower()


def _is_key(value: Any) -> bool:
    """Plain values, and tuples of them: such tuples in tuples, each twice in the next, take for ever to hash."""
    parts = value if isinstance(value, tuple) else (value,)
    return all(part is None or isinstance(part, str | int | float | Global) for part in parts)


def _adds(kind: type, state: Any) -> bool:
    """Whether a state is attributes that objects of this kind do not have already."""
    return isinstance(state, Keys) and all(isinstance(key, str) and not hasattr(kind, key) for key in state)


def _storage(pid: Any) -> Storage:
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
    """Whether a tensor's last element lies in its storage; repeating by a stride of zero allocates nothing."""
    if not isinstance(storage, Storage) or not all(isinstance(numbers, tuple) for numbers in (size, stride)):
        return False
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS or not all(map(_is_count, (offset, *size, *stride))):
        return False
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return 0 in size or offset + last < storage.numel


def _is_backed(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> bool:
    """Whether the storage also holds as many elements."""
    return _fits(storage, offset, size, stride) and math.prod(size) <= storage.numel


def _rebuilt(build: Any, _: Any, arguments: Any, state: Any) -> bool:
    """A tensor with further attributes."""
    _check_call(build.name, arguments)
    return _are_attributes(state)


def _are_attributes(state: Any) -> bool:
    """None, a dict, or both kinds of attributes that Python knows."""
    parts = state if isinstance(state, tuple) else (state,)
    return all(part is None or _adds(Tensor, part) for part in parts)


def _are_keys(*given: Any) -> bool:
    """Nothing, a mapping, or a list of keys or pairs."""
    if not given or isinstance(given[0], Keys):
        return True
    return isinstance(given[0], list) and all(_is_key(item[0] if isinstance(item, list) else item) for item in given[0])


def _are(*kinds: type) -> Callable[..., bool]:
    return lambda *given: all(type(item) in kinds for item in given)


def _is_bytes(*given: Any) -> bool:
    """As protocol 2 writes bytes: text of the first 256 characters."""
    return not given or (isinstance(given[0], str | Unknown) and given[1:] in ((), ("latin1",), ("latin-1",)))


def _are_sizes(*given: Any) -> bool:
    return all(isinstance(sizes, tuple | list) and all(map(_is_count, sizes)) for sizes in given)


# Bytes of an element, by the beginning of a storage's name; newer dtypes lie in untyped ones.
_ITEM_SIZES = {
    **dict.fromkeys(("Untyped", "Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
_MAPPINGS = ("collections.OrderedDict", "collections.Counter", "builtins.set", "__builtin__.set")
_CALLS: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(_MAPPINGS, _are_keys),
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
