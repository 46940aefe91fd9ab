"""How closely a file computes what its network does.

Networks with gates, and routers, decide: a saliency is above its threshold or not, an image goes here or there. Where
such a decision hangs on the last digits, two correct runtimes may decide otherwise and then answer otherwise. Images on
which that happens are counted by themselves; more than a few of them are a mismatch like any other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import CheckFailed, InputError
from prunekit.surgery.buckets import Router
from prunekit.surgery.gated import gated_layers

Batch = tuple[Tensor, Tensor | None]
"""Images `(N, ...)`, normalised, and their labels `(N,)` where they are known."""

TOLERANCE = 1e-4
_MOST_UNDECIDED = 0.01  # of all images, and at least one


@dataclass(frozen=True)
class Parity:
    """How a file's outputs compare with the network's, over `images` inputs.

    `difference` is max |difference of outputs|, `scale` max |output| of the network, `agreement` the share of images
    with the same top class (None where the outputs are not `(N, classes)`); the `undecided` images, whose gates or
    route hang on rounding and came out otherwise, are left out of both. With labels, `accuracy` is the network's and
    `exported_accuracy` the file's, over all images. Shares are from 0 to 1.
    """

    difference: float
    scale: float
    agreement: float | None
    images: int
    accuracy: float | None = None
    exported_accuracy: float | None = None
    undecided: int = 0


def compare(
    model: nn.Module,
    runtime: nn.Module,
    batches: Iterable[Batch],
    fixed_batch: int | None = None,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Run both on the same inputs, in batches of `fixed_batch` where the file takes no other size."""
    tally = _Tally(tolerance, partial(hangs_on_rounding, model, margin=tolerance))
    with torch.inference_mode():
        for images, labels in sized(batches, fixed_batch):
            tally.add(images, model(images), runtime(images), labels)
    return tally.parity()


def require(parity: Parity, tolerance: float = TOLERANCE, min_agreement: float = 1.0, what: str = "") -> None:
    """Raise `CheckFailed` where outputs differ by more than `tolerance`, relative to the largest |output| where that is
    above one, or less than `min_agreement` of the images get the same top class. `what` names the network exported.
    """
    subject = f"the exported {what or 'network'}"
    allowed = tolerance * max(1.0, parity.scale)
    if not parity.difference <= allowed:
        raise CheckFailed(
            f"{subject}'s outputs differ from the model's by {parity.difference:.1e}, and {allowed:.1e} is "
            "allowed; nothing was written",
            hint="a larger --tolerance allows more",
        )
    if parity.undecided > max(1.0, _MOST_UNDECIDED * parity.images):
        raise CheckFailed(
            f"{subject} decides otherwise on {parity.undecided} of {parity.images} images, where saliencies or routes "
            "hang on rounding; nothing was written",
            hint="thresholds of another budget (--budget) may lie where fewer saliencies do",
        )
    if parity.agreement is not None and parity.agreement < min_agreement:
        raise CheckFailed(
            f"{subject} names {1 - parity.agreement:.2%} of {parity.images} images otherwise; nothing was written",
            hint="--min-agreement 0.999 allows a thousandth, where two classes are as good as tied",
        )


def sized(batches: Iterable[Batch], size: int | None) -> Iterator[Batch]:
    """The same images in batches of the one `size` that the file takes; a rest that fills none is left out."""
    if size is None:
        yield from batches
        return
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch, named in batches:
        images += batch.unbind()
        labels += named.unbind() if named is not None else []
        while len(images) >= size:
            yield torch.stack(images[:size]), torch.stack(labels[:size]) if labels else None
            del images[:size], labels[:size]


def hangs_on_rounding(model: nn.Module, images: Tensor, margin: float) -> Tensor:
    """For each of `images` whether a decision of `model` is so near that rounding may turn it, `(N,)`.

    That is a saliency within `margin` of its threshold, relative to the largest saliency of its layer, or two buckets
    whose scores in the router are within `margin` of each other, relative to the largest score.
    """
    near = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def at_threshold(_: nn.Module, __: Any, pi: Tensor, *, threshold: Tensor) -> None:
        if threshold > 0:  # at zero both sides of it are zero
            near.logical_or_(((pi - threshold).abs() <= margin * pi.max()).any(1))

    def at_fork(_: nn.Module, __: Any, scores: Tensor) -> None:
        best = scores.topk(2, dim=1).values
        near.logical_or_(best[:, 0] - best[:, 1] <= margin * scores.abs().max())

    with contextlib.ExitStack() as hooks:
        for _, layer in gated_layers(model):
            hooks.enter_context(layer.gate.register_forward_hook(partial(at_threshold, threshold=layer.threshold)))
        for module in model.modules():
            if isinstance(module, Router):
                hooks.enter_context(module.register_forward_hook(at_fork))
        model(images)
    return near


class _Tally:
    """What has been compared so far."""

    def __init__(self, tolerance: float, hangs: Callable[[Tensor], Tensor]) -> None:
        self.tolerance, self.hangs = tolerance, hangs
        self.difference = self.scale = 0.0
        self.seen = self.same = self.undecided = self.labelled = self.right = self.exported_right = 0
        self.classifies = True

    def add(self, images: Tensor, wanted: Tensor, found: Tensor, labels: Tensor | None) -> None:
        """One batch and its outputs, `wanted` from the network and `found` from the file."""
        if wanted.shape != found.shape:
            shapes = f"{tuple(found.shape)} instead of {tuple(wanted.shape)}"
            raise CheckFailed(f"the exported network gives outputs of shape {shapes}; nothing was written")
        self.scale = max(self.scale, float(wanted.abs().max()))
        self.seen += len(wanted)
        self.classifies = self.classifies and wanted.dim() == 2
        # a comparison with NaN is never true: let it show as an infinite difference
        gaps = (wanted.double() - found.double()).abs().flatten(1).amax(1).nan_to_num(math.inf, math.inf)
        same = wanted.argmax(1) == found.argmax(1) if self.classifies else torch.ones_like(gaps, dtype=torch.bool)
        suspect = (gaps > self.tolerance * max(1.0, self.scale)) | ~same
        counted = ~(suspect & self.hangs(images)) if bool(suspect.any()) else torch.ones_like(same)
        self.undecided += int((~counted).sum())
        self.difference = max(self.difference, float(gaps[counted].max()) if bool(counted.any()) else 0.0)
        self.same += int((same & counted).sum())
        if self.classifies and labels is not None:
            self.labelled += len(labels)
            self.right += int((wanted.argmax(1) == labels).sum())
            self.exported_right += int((found.argmax(1) == labels).sum())

    def parity(self) -> Parity:
        """The comparison as a whole."""
        if not self.seen:
            raise InputError("there are no images to compare the exported network on")
        labelled = self.labelled == self.seen
        return Parity(
            difference=self.difference,
            scale=self.scale,
            agreement=self.same / max(1, self.seen - self.undecided) if self.classifies else None,
            images=self.seen,
            accuracy=self.right / self.seen if labelled else None,
            exported_accuracy=self.exported_right / self.seen if labelled else None,
            undecided=self.undecided,
        )
