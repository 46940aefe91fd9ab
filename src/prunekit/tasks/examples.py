"""The examples of a task of one's own as a set: sized, divisible, and in batches that depend on the order alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from prunekit.data import Examples
from prunekit.errors import InputError, unknown_name
from prunekit.models import told
from prunekit.tasks.nests import placed, tensors_in

if TYPE_CHECKING:
    from prunekit.spec import InputSpec

SPLITS = ("train", "val", "test")
_LOOKED_AT = 4  # examples by which sets are told apart


class Source(Protocol):
    """The part of a task that its examples come from."""

    @property
    def name(self) -> str:
        """What people call it."""

    def examples(self, split: str) -> Any:
        """Return the examples of a split; see `Task.examples`."""


@dataclass(frozen=True, eq=False)
class TaskExamples(Examples):
    """Examples of `source`, a list or a `torch.utils.data` set, at the places `index`; `collate` makes batches."""

    task: Source
    split: str
    source: Any = field(repr=False)
    index: Tensor = field(repr=False)
    collate: Callable[[list[Any]], Any] = default_collate
    held_out: bool = False
    input_spec: InputSpec | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """What people call the data set."""
        return self.task.name

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, index: Tensor | Sequence[int]) -> TaskExamples:
        """Return the examples at `index` as a set, in that order."""
        return replace(self, index=self.index[torch.as_tensor(index, dtype=torch.int64)])

    def batches(
        self,
        batch_size: int = 256,
        *,
        device: torch.device | str = "cpu",
        order: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Any]:
        """Yield batches on `device`; see `Examples.batches`.

        Raises:
            InputError: The examples cannot be read, or not be put together.
        """
        chosen = self.index if order is None else self.index[order.cpu()]
        for places in torch.split(chosen, batch_size) if len(chosen) else ():
            yield placed(self._batch(places.tolist()), device, dtype)

    def views(
        self,
        batch_size: int,
        order: Tensor,
        *,
        seed: Sequence[int],
        augment: str = "auto",
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Any]:
        """Yield batches for training; what varies in them, the task's own examples do.

        Raises:
            InputError: An augmentation was asked for, or the examples cannot be read.
        """
        del seed, channels_last
        if augment not in ("auto", "none"):
            raise InputError(
                f"--augment {augment} is for labelled images; the task {self.name} augments its examples itself"
            )
        return self.batches(batch_size, device=device, order=order, dtype=dtype)

    def identity(self) -> bytes:
        """Return what tells these examples from others: their number, and a few of them."""
        digest, few = hashlib.sha256(), self.index[:: max(1, len(self) // _LOOKED_AT)]
        for tensor in tensors_in([self._batch([place]) for place in few.tolist()]):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        return f"{self.name} {len(self)} {digest.hexdigest()}".encode()

    def _batch(self, places: list[int]) -> Any:
        try:
            return self.collate([self.source[place] for place in places])
        except InputError:
            raise
        except Exception as error:  # whatever the code of a data set raises
            raise InputError(
                f"the examples of the task {self.name} ({self.split}) cannot be read: {told(error)}",
                hint="examples(split) returns a list or a torch.utils.data set, of nests of tensors of equal shapes",
            ) from error


def open_split(task: Source, split: str) -> Examples:
    """Return the examples of a split; where a task has none for "val", every tenth training example is one.

    Raises:
        InputError: There is no such split, or the task has no examples that can be indexed.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    found = _given(task, split)
    if split == "train" and found is not None and _called(task, "val") is None:
        return _without_tenths(found)
    if found is None and split == "val":
        every = _given(task, "train")
        if every is not None and len(every) >= 10:
            return _tenths(every)
        raise InputError(f"the task {task.name} has too few training examples to hold some out for validation")
    if found is None:
        raise InputError(f"the task {task.name} has no examples for {split}", hint="examples(split) returned None")
    return found


def _given(task: Source, split: str) -> TaskExamples | None:
    source, collate = _called(task, split), default_collate
    if source is None:
        return None
    if hasattr(source, "dataset") and hasattr(source, "collate_fn"):  # a DataLoader: its order and workers are ours
        source, collate = source.dataset, source.collate_fn
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise InputError(
            f"the examples of the task {task.name} ({split}) are {type(source).__name__}, which cannot be indexed",
            hint="examples(split) returns a list, a map-style torch.utils.data set, or a DataLoader of one",
        )
    if not len(source):
        raise InputError(f"the task {task.name} has no examples for {split}")
    return TaskExamples(task, split, source, torch.arange(len(source)), collate)


def _called(task: Source, split: str) -> Any:
    try:
        return task.examples(split)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the task {task.name} cannot give its examples for {split}: {told(error)}") from error


def _tenths(every: TaskExamples) -> TaskExamples:
    return replace(every, split="val", index=every.index[9::10], held_out=True)


def _without_tenths(every: TaskExamples) -> TaskExamples:
    return replace(every, index=every.index[torch.arange(len(every)) % 10 != 9])
