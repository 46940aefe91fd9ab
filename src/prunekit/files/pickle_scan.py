"""Check pickles of tensors before they are loaded: they may build no more than the file holds.

`torch.load(weights_only=True)` runs no code of the file, yet it allocates whatever size the file names: a bytearray, a
storage, a tensor class called with a number. This walk over the same opcodes knows what each call would allocate.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from prunekit.errors import InputError
from prunekit.files.pickled_calls import (
    MAPPINGS,
    BadPickleError,
    Global,
    Keys,
    Storage,
    Unknown,
    adds_to,
    check_call,
    is_key,
    storage_of,
    trusted,
)

# Most bytes of one pickle without its tensors; the longest histories of training runs are far shorter.
_LONGEST = 1 << 24


def check(stream: BinaryIO, name: str, sizes: Mapping[str, int] | None, *, pickles: int = 1) -> None:
    """Follow `pickles` pickles from the current position of the stream.

    Args:
        stream: A seekable stream, at the beginning of the first pickle.
        name: The name of the file, for error messages.
        sizes: The size in bytes of each storage, by its key; None bounds all storages together by the size of the
            stream.
        pickles: How many pickles follow one another.

    Raises:
        InputError: A pickle is damaged, would allocate more than the file holds, or makes a call that no state dict
            needs.
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
                raise BadPickleError(f"a storage of {claimed} bytes, where {sizes.get(key, 0)} are held")
        if sizes is None and sum(storages.values()) > held:
            raise BadPickleError(f"storages of {sum(storages.values())} bytes in a file of {held}")
    except BadPickleError as error:
        raise InputError(f"{name} is refused: its pickle asks for {error}") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{name} is damaged or truncated: no valid pickle of tensors") from error


class _Walk:
    """Stack machine of pickles over constants, containers without content, and `Global`, `Storage` and `Unknown`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def storages(self) -> Iterator[Storage]:
        """Run to the end and yield every storage on the way."""
        for opcode, argument, position in pickletools.genops(self._stream):
            if position is not None and position > _LONGEST:
                raise BadPickleError(f"more than {_LONGEST} bytes besides its tensors")
            if opcode.name == "BINPERSID":
                self._stack[-1] = storage_of(self._stack[-1])
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
        """Push the name of something in a module."""
        self._stack.append(Global(argument.replace(" ", ".", 1)))

    def put(self, index: int) -> None:
        """Store the top of the stack in the memo."""
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        """Push an entry of the memo."""
        self._stack.append(self._memo[index])

    def tuple_of(self, count: int) -> None:
        """Turn the last `count` values into a tuple."""
        if len(self._stack) < count:
            raise ValueError("a tuple of less")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def tuple_marked(self, _: Any) -> None:
        """Turn the values since the mark into a tuple."""
        items = self._marked()
        self._stack.append(tuple(items))

    def append(self, _: Any) -> None:
        """Append a value to a list."""
        item = self._stack.pop()
        self._stack[-1].append(item)

    def extend(self, _: Any) -> None:
        """Append the values since the mark to a list."""
        items = self._marked()
        self._stack[-1].extend(items)

    def set_item(self, _: Any) -> None:
        """Add an entry to a mapping."""
        self._stack.pop()
        self._note([self._stack.pop()])

    def set_items(self, _: Any) -> None:
        """Add the entries since the mark to a mapping."""
        self._note(self._marked()[::2])

    def _note(self, keys: list[Any]) -> None:
        if not isinstance(self._stack[-1], Keys):
            raise ValueError("an entry of what is no mapping")
        if not all(map(is_key, keys)):
            raise BadPickleError("a dict with a key that is no plain value")
        self._stack[-1].extend(keys)

    def call(self, _: Any) -> None:
        """Call a name with arguments: only names in the table, each with its own check of the arguments."""
        arguments, called = self._stack.pop(), self._stack[-1]
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no name")
        if called.name not in trusted():
            check_call(called.name, arguments)
        self._stack[-1] = Keys() if called.name in MAPPINGS else Unknown()

    def build(self, _: Any) -> None:
        """Set the state of an object: a mapping may get further attributes."""
        state = self._stack.pop()
        if isinstance(self._stack[-1], Keys) and not adds_to(OrderedDict, state):
            raise BadPickleError("a dict whose methods are others")
        if not isinstance(self._stack[-1], Keys | Unknown):
            raise ValueError("a state of what has none")


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
    "TUPLE1": lambda walk, _: walk.tuple_of(1),
    "TUPLE2": lambda walk, _: walk.tuple_of(2),
    "TUPLE3": lambda walk, _: walk.tuple_of(3),
    "TUPLE": _Walk.tuple_marked,
    "APPEND": _Walk.append,
    "APPENDS": _Walk.extend,
    "SETITEM": _Walk.set_item,
    "SETITEMS": _Walk.set_items,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Walk.call),
    "BUILD": _Walk.build,
}
