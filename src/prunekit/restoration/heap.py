"""Memory that has been freed, given back to the system.

glibc serves tensors of up to some 32 MiB from one heap, and gives back only what is free at its end. Where large
tensors come and go in between others that stay, the holes add up to many times what is in use.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def give_back() -> None:
    """Give back what is free in the heap, wherever it is; nothing happens where the C library is not glibc."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's `malloc_trim`, which since 2.8 gives back free pages in the midst of the heap too."""
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
    return trim
