"""The tensors in what a forward returns, whatever kind of object that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CLOSED = (str, bytes, bytearray, int, float, complex, type, FunctionType, MethodType, ModuleType, nn.Module)
_NUMERIC = "biufc"  # kinds of NumPy arrays that PyTorch has too


def tensors_of(output: Any) -> dict[str, Tensor]:
    """Return every tensor in `output` by its place: `""` for the output itself, else such as `.logits` or `[0].mean`.

    Sequences, sets, mappings, named tuples, data classes and any other objects are looked through, by their attributes
    and slots; each container once, so that cycles end. Modules are no output, and neither are plain numbers.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", output)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Tensor):
            found[place] = value
        elif isinstance(value, np.ndarray) and value.dtype.kind in _NUMERIC:
            found[place] = torch.from_numpy(value.copy())
        elif value is not None and not isinstance(value, _CLOSED) and id(value) not in seen:
            seen.add(id(value))
            inside = [(place + step, inner) for step, inner in _inside(value)]
            waiting += reversed(inside)
    return found


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the contents of a container, as items and as attributes."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", value[key]) for key in value)
    elif isinstance(value, list | tuple | AbstractSet) or _is_sequence(value):
        yield from ((f"[{number}]", item) for number, item in enumerate(value))
    yield from ((f".{name}", item) for name, item in getattr(value, "__dict__", {}).items())
    for name in _slots(type(value)):
        if hasattr(value, name):
            yield f".{name}", getattr(value, name)


def _is_sequence(value: Any) -> bool:
    """Return whether it is an object such as `deque`, which goes through its items without being used up."""
    kind = type(value)
    return hasattr(kind, "__len__") and hasattr(kind, "__getitem__") and hasattr(kind, "__iter__")


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in ("__dict__", "__weakref__"):
                continue
            hidden = name.startswith("__") and not name.endswith("__")
            yield f"_{base.__name__.lstrip('_')}{name}" if hidden else name
