"""Class scores in what a network returns, and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit.errors import InputError, TrainingError


def at_least_float(logits: Tensor) -> Tensor:
    """Return logits of a half-precision network in float32; others unchanged."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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


def main_scores(output: Any) -> Tensor:
    """Return the scores of the main classifier in a network's output."""
    scores: Tensor = output[0] if isinstance(output, tuple) and output else output
    return scores


class Counts:
    """Right answers and losses over batches."""

    def __init__(self) -> None:
        self.seen = self.classes = self._right = self._right5 = 0
        self._loss = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Add a batch, logits `(N, classes)` and labels `(N,)`; return the class that each example is given."""
        self.classes = logits.shape[1]
        self._loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        best = logits.topk(min(5, self.classes)).indices
        hits = best == labels[:, None]
        self._right += int(hits[:, 0].sum())
        self._right5 += int(hits.any(1).sum())
        self.seen += len(labels)
        return best[:, 0]

    def scores(self) -> dict[str, float]:
        """Return `accuracy`, `accuracy_top5` where there are more than five classes, and `loss`.

        Raises:
            InputError: Nothing was added.
        """
        if not self.seen:
            raise InputError("the data set has no images", hint="check the folder or the split that was asked for")
        top5 = {"accuracy_top5": self._right5 / self.seen} if self.classes > 5 else {}
        return {"accuracy": self._right / self.seen, **top5, "loss": self._loss / self.seen}


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
