"""Forward pass of a user's classifier: check that it returns class scores, and explain its errors.

Whatever the network's code raises is reported as its error, with advice on the usual ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import models
from prunekit.data import ImageSet, check_classes
from prunekit.errors import InputError, PrunekitError, TrainingError
from prunekit.spec import classes_of

# Messages of torch, and the advice for each.
_SIZES = r"cannot be multiplied|[Ss]izes? of tensor|[Ss]ize mismatch|too small|greater than actual|invalid for input of"
_ADVICE = (
    (
        r"Expected more than 1 (value|spatial element)",
        "a batch norm needs several images at a time: raise --batch-size (which accumulation and processes divide), "
        "and train on a set that has as many",
    ),
    (r"same dtype|expected scalar type|should be the same|dtype mismatch", "bring all its weights to one dtype first"),
    (r"to have \d+ channels", "--input-size says how many channels the images are to have, such as 3x32x32"),
    (_SIZES, "--input-size says how large the images are to be, such as 3x32x32"),
)
_NO_GRADIENT = "does not require grad"


def answer(network: nn.Module, images: Tensor) -> Any:
    """Return the output of `network` for `images`; raise `TrainingError` for its errors, except a lack of memory."""
    try:
        return network(images)
    except PrunekitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        shape = tuple(images.shape)
        raise TrainingError(
            f"the network failed on a batch of shape {shape}: {models.told(error)}", hint=_advice(error)
        ) from error


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


def class_scores(output: Any, count: int) -> tuple[Tensor, list[Tensor]]:
    """Return the scores `(count, classes)` in a network's output, and those of its auxiliary classifiers.

    Raises:
        TrainingError: The output is neither one such tensor nor a tuple of several of one shape, of which auxiliary
            ones may be None.
    """
    scores, *others = output if isinstance(output, tuple) and output else (output,)
    auxiliary = [other for other in others if other is not None]
    if all(_is_scores(one, count) for one in (scores, *auxiliary)) and {one.shape for one in auxiliary} <= {
        scores.shape
    }:
        return scores, auxiliary
    raise TrainingError(
        f"the network returns {_described(output)}, expected class scores of shape ({count}, classes)",
        hint="let its forward return these alone, or in a tuple before auxiliary classifiers' scores of the same shape",
    )


@torch.no_grad()
def check_fit(model: nn.Module, train_set: ImageSet, val_set: ImageSet | None, teacher: nn.Module | None) -> None:
    """Raise `InputError` unless the images, their labels, the network and the teacher fit together.

    The networks run in their present mode.
    """
    if not len(train_set):
        raise InputError(f"{train_set.name} has no images to train on")
    sets = [data for data in (train_set, val_set) if data is not None and len(data)]
    for data in sets:
        _check_labels(data)
    weight = next(model.parameters(), torch.empty(0))
    # twice, since a network may drop the dimension of a batch of one
    twice = torch.zeros(2, dtype=torch.int64, device=train_set.labels.device)
    images, _ = next(train_set.batches(2, device=weight.device, order=twice, dtype=dtype_of(model)))
    classes = class_scores(answer(model, images), 2)[0].shape[1]
    for data in sets:
        check_classes(classes, data, classes_of(model))
    if teacher is None:
        return
    named = classes_of(teacher)
    if named and named != train_set.classes:
        raise InputError(
            "the teacher's outputs are of other classes, or in another order, than those of the network",
            hint="distil from a network whose outputs mean the same (inspect --json shows their `classes`)",
        )
    known = class_scores(answer(teacher, images), 2)[0].shape[1]
    if known != classes:
        raise InputError(f"the teacher knows {known} classes, and the network {classes}")


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the network's weights, which its images must have."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory has run out, on any device."""
    # On the CPU the allocator has no error class of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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


def _is_scores(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 2 and len(value) == count


def _described(output: Any) -> str:
    """Describe an output, with the shapes of the tensors in it."""
    if isinstance(output, Tensor):
        kind = "" if output.is_floating_point() else f" of {output.dtype}"
        return f"a tensor{kind} of shape {tuple(output.shape)}"
    name = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {name} of " + ", ".join(f"{key} {_brief(value)}" for key, value in output.items())
    if isinstance(output, tuple | list):
        return f"a {name} of " + (", ".join(map(_brief, output)) or "nothing")
    return "None" if output is None else f"an object of the type {name}"


def _brief(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _advice(error: Exception) -> str:
    said = str(error)
    found = (advice for pattern, advice in _ADVICE if re.search(pattern, said))
    return next(found, "the error is that of its own code; --debug shows where it was raised")
