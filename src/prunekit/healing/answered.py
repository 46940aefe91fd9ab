"""Images whose labels are the original's answers: agreement with the original is accuracy on them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from prunekit.data import ImageSet
from prunekit.data.shapes import suited_augmentation
from prunekit.errors import InputError, counted
from prunekit.spec import InputSpec, classes_of
from prunekit.tasks.logits import class_scores
from prunekit.tasks.nests import floating_type
from prunekit.training.forward import answer

_TENTH = 10  # of the images is held out


def image_set(images: Tensor) -> ImageSet:
    """Return normalised images `(N, C, H, W)` as a set that gives them back, in 256 steps from least to most.

    Images come from pictures of 256 steps; so little is lost, and they can be shifted, mirrored and cut like pictures.
    """
    values = images.detach().float().cpu()
    low, high = values.amin((0, 2, 3)), values.amax((0, 2, 3))
    span = (high - low).clamp_min(1e-12)
    pixels = ((values - low[:, None, None]) / span[:, None, None] * 255).round().to(torch.uint8)
    spec = InputSpec(tuple(images.shape[1:]), tuple((-low / span).tolist()), tuple((1 / span).tolist()))
    augment = suited_augmentation(spec, mirrors=images.shape[1] == 3)
    return ImageSet("images", "train", pixels, torch.zeros(len(images), dtype=torch.int64), ("",), spec, augment)


@torch.no_grad()
def answered(original: nn.Module, data: ImageSet) -> ImageSet:
    """Return `data` with the classes that `original` answers as labels.

    Raises:
        InputError: It has a single output, or gives all images one class.
    """
    home = next(original.parameters(), torch.empty(0)).device
    batches = data.batches(64, device=home, dtype=floating_type(original))
    scores = torch.cat([class_scores(answer(original, images), len(images))[0].cpu() for images, _ in batches])
    if not bool(torch.isfinite(scores).all()):
        raise InputError(
            "the original gives no numbers for these images", hint="look at the images, and at their --std"
        )
    count, labels = scores.shape[1], scores.argmax(1)
    if count == 1:
        raise InputError("the network has a single output, and healing is judged by the class that is answered")
    names = classes_of(original) or tuple(map(str, range(count)))
    if len(labels) > 1 and bool((labels == labels[0]).all()):
        raise InputError(
            f"the original answers all {counted(len(labels), 'image')} with one class, '{names[int(labels[0])]}': they "
            "show nothing of the others",
            hint="take images of several classes, normalised as in training (--mean, --std)",
        )
    return dataclasses.replace(data, labels=labels, classes=tuple(names))


def parted(data: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return the images to heal on, and every tenth of each class, at least one of all, which are held out."""
    order = torch.argsort(data.labels, stable=True)
    held = order[torch.arange(len(order)) % _TENTH == min(_TENTH, len(order)) - 1]
    rest = torch.ones(len(order), dtype=torch.bool)
    rest[held] = False
    return data.subset(rest.nonzero().flatten()), data.subset(held.sort().values)
