"""Tensors that wait in a file: what they hold is moved there and back, and they stay the objects that they are.

Only the storage of such a tensor is emptied, and all of its views with it; a forward pass that holds it need not know.
The file has no name from the start where the system allows it (see `tempfile.TemporaryFile`), so that nothing is left
behind however the process ends.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from prunekit.errors import InputError
from prunekit.restoration.heap import give_back
from prunekit.restoration.memory import size_in_words

_PART = 8 << 20  # bytes that are moved at a time
_HOLES = 128 << 20  # bytes that are moved away until the holes that they leave in the heap are given back
_HINT = "pass fewer images, allow more with --memory, or name a folder on a larger disk with TMPDIR"


class Spill:
    """A file for tensors that wait."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)  # places that are free again, by size
        self._waiting: Any = WeakIdKeyDictionary()
        self._part = torch.empty(0, dtype=torch.uint8)
        self._holes = 0  # bytes that have been moved away since holes were given back

    def check(self, size: int) -> None:
        """Check that there is room for so many bytes.

        Raises:
            InputError: There is not.
        """
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if free < size:
            what = f"images that wait take up to {size_in_words(size)} on disk"
            raise InputError(f"{what}, and {folder} has {size_in_words(free)} left", hint=_HINT)

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Move what tensors hold into the file: all that are in use of those which share one storage.

        Raises:
            InputError: The disk is full.
        """
        storage = tensors[0].untyped_storage()
        entry = _Entry(self._place(storage.nbytes()), storage.nbytes(), self._free)
        try:
            self._move(storage, entry.place, write=True)
        except OSError as error:
            raise InputError(f"writing to {tempfile.gettempdir()} fails: {error.strerror}", hint=_HINT) from error
        storage.resize_(0)
        for tensor in tensors:
            self._waiting[tensor] = entry
        self._holes += entry.size
        if self._holes >= _HOLES:
            give_back()
            self._holes = 0

    def fetch(self, tensor: Tensor) -> None:
        """Move back what a tensor holds, if it waits."""
        entry: _Entry | None = self._waiting.pop(tensor, None)
        storage = tensor.untyped_storage()
        if entry is not None and storage.nbytes() == 0:  # else a view of it has been fetched
            storage.resize_(entry.size)
            self._move(storage, entry.place, write=False)
            entry.leave()

    def close(self) -> None:
        """Move back what is still in use, and delete the file."""
        for tensor in list(self._waiting):
            self.fetch(tensor)
        if self._file is not None:
            self._file.close()

    def _place(self, size: int) -> int:
        if self._free[size]:
            return self._free[size].pop()
        self._end += size
        return self._end - size

    def _move(self, storage: torch.UntypedStorage, place: int, *, write: bool) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
            self._part = torch.empty(_PART, dtype=torch.uint8)
        self._file.seek(place)
        for part in torch.split(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), _PART):
            here = self._part[: len(part)]
            if write:
                self._file.write(here.copy_(part).numpy().data)
            else:
                self._file.readinto(here.numpy().data)  # type: ignore[attr-defined]
                part.copy_(here)


class _Entry:
    """The place in the file, and the bytes, of a storage that waits; the place is free again once no tensor refers to
    this, or before.
    """

    def __init__(self, place: int, size: int, free: dict[int, list[int]]) -> None:
        self.place, self.size = place, size
        self.leave = weakref.finalize(self, free[size].append, place)
