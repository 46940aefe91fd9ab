"""Sets of examples, labelled images or those of a task of one's own: what they are for, and what a network reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.data import Examples, ImageSet, labelled_for
from prunekit.errors import InputError
from prunekit.tasks.base import Task
from prunekit.tasks.classification import CLASSIFICATION, Classification

_READ = 64  # examples that are read at a time


def task_of(examples: Examples) -> Task:
    """Return what a set of examples is for; that of labelled images is classification."""
    found: Task = getattr(examples, "task", CLASSIFICATION)
    return found


def fitted_to(model: nn.Module, examples: Examples) -> Examples:
    """Return examples whose labels number the outputs of `model`, where these are images; others as they are.

    Raises:
        InputError: The model has no output, or several, of the name of a class.
    """
    return labelled_for(model, examples) if isinstance(examples, ImageSet) else examples


def inputs_of(examples: Examples, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Return what a network of type `dtype` reads of the first example, a batch of one, as arguments of its forward."""
    inputs = task_of(examples).inputs(next(iter(examples.subset([0]).batches(1, dtype=dtype))))
    return inputs if isinstance(inputs, tuple) else (inputs,)


def labelled_batches(
    examples: Examples, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield what a network with a single input reads, with class labels `(n,)` where examples are classified.

    Raises:
        InputError: The network reads more than one tensor.
    """
    task = task_of(examples)
    for batch in examples.batches(batch_size, device=device):
        inputs = task.inputs(batch)
        if not isinstance(inputs, Tensor):
            raise InputError(f"the task {task.name} has networks with several inputs, which cannot have gates")
        yield inputs, batch[1] if isinstance(task, Classification) else None


def all_inputs(examples: Examples) -> Any:
    """Return what a network reads of all examples: one tensor `(N, ...)`, or a tuple of them."""
    if isinstance(examples, ImageSet):
        return examples.inputs()
    task, parts = task_of(examples), list[tuple[Tensor, ...]]()
    for batch in examples.batches(_READ):
        inputs = task.inputs(batch)
        parts.append(inputs if isinstance(inputs, tuple) else (inputs,))
    joined = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return joined[0] if len(joined) == 1 else joined
