"""Images that a method restores from, or reads a loss on."""

from __future__ import annotations

from typing import Any, TypeVar

from prunekit.data import Examples, ImageSet
from prunekit.errors import InputError
from prunekit.methods import registry
from prunekit.metric import ACCURACY
from prunekit.restoration.images import Images, LabelledImages
from prunekit.tasks.sets import all_inputs, inputs_of, task_of

_Set = TypeVar("_Set", bound=Examples)
_BATCH = 64  # labelled images: a gradient is averaged over so many


def example_for(examples: Examples | None) -> tuple[Any, ...] | None:
    """Return the inputs by which a network is read: those of the first example; None for what it remembers to read."""
    return None if examples is None or isinstance(examples, ImageSet) else inputs_of(examples)


def drawn(name: str, train_set: Examples, count: int, seed: int = 0) -> Images | LabelledImages:
    """Return what a network reads of `count` training examples for the method `name`, drawn by `seed`.

    Without their labels, as one tensor `(N, ...)` or a tuple of them; as batches with labels for a method that reads
    these.

    Raises:
        InputError: Fewer than one was asked for.
    """
    chosen = sampled(train_set, count, seed)
    if registry.get(name).labelled:
        if not isinstance(train_set, ImageSet) and task_of(train_set).metric != ACCURACY:
            raise InputError(f"'{name}' reads class labels, which the task {train_set.name} does not have")
        return list(chosen.batches(_BATCH))
    found: Images = all_inputs(chosen)
    return found


def sampled(train_set: _Set, count: int, seed: int = 0) -> _Set:
    """Return `count` training examples, drawn by `seed`.

    Raises:
        InputError: Fewer than one was asked for.
    """
    if count < 1:
        raise InputError(f"--calibration must be at least 1, not {count}")
    return train_set.sample(min(count, len(train_set)), seed=seed)
