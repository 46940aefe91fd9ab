"""Forward and backward pass of a user's network: check that it fits its task, and explain its errors.

Whatever the network's code raises is reported as its error, with advice on the usual ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit import models
from prunekit.data import Examples, ImageSet, check_classes
from prunekit.errors import InputError, PrunekitError, TrainingError
from prunekit.spec import classes_of
from prunekit.tasks.calls import is_out_of_memory, loss_of, named_scores, network_failed
from prunekit.tasks.logits import class_scores
from prunekit.tasks.nests import called, described, floating_type, shapes_in
from prunekit.tasks.sets import task_of

_NO_GRADIENT = "does not require grad"


def answer(network: nn.Module, inputs: Any) -> Any:
    """Return the output of `network` for its inputs; raise `TrainingError` for its errors, except a lack of memory."""
    try:
        return called(network, inputs)
    except PrunekitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise network_failed(inputs, error) from error


def backward(loss: Tensor) -> None:
    """Compute the gradient of `loss`; raise `TrainingError` where the network lets none through."""
    try:
        torch.autograd.backward(loss)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        found = "its forward lets none through: look for no_grad and detach" if _NO_GRADIENT in str(error) else None
        raise TrainingError(
            f"the gradient of the network cannot be computed: {models.told(error)}", hint=found
        ) from error


@torch.no_grad()
def check_fit(model: nn.Module, train_set: Examples, val_set: Examples | None, teacher: nn.Module | None) -> None:
    """Raise an error unless the examples, the network and the teacher fit together; they run in their present mode.

    Raises:
        InputError: No examples, labels that are none, or networks for other classes.
        TrainingError: A network or the task fails, or gives something else than is needed.
    """
    if not len(train_set):
        raise InputError(f"{train_set.name} has no images to train on")
    sets = [data for data in (train_set, val_set) if data is not None and len(data)]
    if isinstance(train_set, ImageSet):
        _check_classes(model, [data for data in sets if isinstance(data, ImageSet)], teacher)
    else:
        _check_task(model, sets, teacher)


def _check_classes(model: nn.Module, sets: list[ImageSet], teacher: nn.Module | None) -> None:
    for data in sets:
        _check_labels(data)
    images, _ = _twice(model, sets[0])
    classes = class_scores(answer(model, images), 2)[0].shape[1]
    for data in sets:
        check_classes(classes, data, classes_of(model))
    if teacher is None:
        return
    named = classes_of(teacher)
    if named and named != sets[0].classes:
        raise InputError(
            "the teacher's outputs are of other classes, or in another order, than those of the network",
            hint="distil from a network whose outputs mean the same (inspect --json shows their `classes`)",
        )
    known = class_scores(answer(teacher, images), 2)[0].shape[1]
    if known != classes:
        raise InputError(f"the teacher knows {known} classes, and the network {classes}")


def _check_task(model: nn.Module, sets: list[Examples], teacher: nn.Module | None) -> None:
    for data in sets:
        task, batch = task_of(data), _twice(model, data)
        _, ours = loss_of(task, model, batch)
        named_scores(task, model, iter([batch]))
    if teacher is not None:
        theirs = answer(teacher, task.inputs(batch))
        if shapes_in(ours) != shapes_in(theirs):
            raise InputError(f"the teacher gives {described(theirs)}, and the network {described(ours)}")


def _twice(model: nn.Module, data: Examples) -> Any:
    """Return a batch of the first example, twice, since a network may drop the dimension of a batch of one."""
    weight = next(model.parameters(), torch.empty(0))
    order = torch.zeros(2, dtype=torch.int64)
    return next(iter(data.batches(2, device=weight.device, order=order, dtype=floating_type(model))))


def _check_labels(data: ImageSet) -> None:
    labels = data.labels
    if labels.dtype != torch.int64:
        raise InputError(f"the labels of {data.name} are {labels.dtype}, expected torch.int64")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(data.classes):
        raise InputError(
            f"{data.name} has labels from {low} to {high}, and {len(data.classes)} classes",
            hint=f"labels must be from 0 to {len(data.classes) - 1}",
        )
