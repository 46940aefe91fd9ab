"""Calibration images: read once, without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.surgery import Graph

Images = Tensor | Iterable[Tensor]
"""Unlabelled, normalised images: one tensor `(N, C, H, W)`, or batches of them."""

LabelledImages = Iterable[tuple[Tensor, Tensor]]
"""Batches of normalised images `(N, C, H, W)` and their labels `(N,)`."""

MEMORY = 4 << 30  # bytes of activations
_PART = 16  # images that are checked at a time: a check takes more memory than they do


def gather(images: Images, model: nn.Module, graph: Graph, most: int | None = None) -> Tensor:
    """Return the images in the model's type and on its device, or `most` of them.

    `images` are normalised, `(N, C, H, W)`: one tensor, or batches.

    Raises:
        InputError: no images, of another shape than the network was read with, or not finite.
    """
    if not reads_images(graph):
        raise InputError("only a network with a single input can be calibrated on images")
    shape = tuple(graph.example[0].shape[1:])
    like = next(p for p in model.parameters() if p.is_floating_point())
    parts: list[Tensor] = []
    for batch in [images] if isinstance(images, Tensor) else images:
        parts.append(_checked(batch, shape)[: None if most is None else most - sum(map(len, parts))].to(like))
        if most is not None and sum(map(len, parts)) >= most:
            break
    if not sum(map(len, parts)):
        raise InputError("there are no calibration images", hint="--data names them; a few hundred are enough")
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def without_labels(images: Images | LabelledImages) -> Images:
    """Return images without the labels that may come with them."""
    if isinstance(images, Tensor):
        return images
    return [batch if isinstance(batch, Tensor) else batch[0] for batch in images]


def reads_images(graph: Graph) -> bool:
    """Return whether the network's input is one tensor, as a batch of images is."""
    return len(graph.example) == 1 and isinstance(graph.example[0], Tensor)


def _checked(batch: object, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(batch, Tensor) or tuple(batch.shape[1:]) != shape:
        found = tuple(batch.shape[1:]) if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
        raise InputError(
            f"calibration images have shape {found}; the network reads {shape}",
            hint="pass normalised images as a tensor (N, C, H, W), or batches of them without labels",
        )
    if not all(bool(torch.isfinite(part).all()) for part in torch.split(batch, _PART)):
        raise InputError("the calibration images contain values that are not finite")
    return batch


def bytes_per_image(graph: Graph) -> int:
    """Return the most that an image's activations take at any moment of a forward, by the lifetimes of its values."""
    last = {value: node.index for node in graph.nodes for value in (*node.inputs, *node.outputs)}
    size: dict[int, int] = {}
    live = most = 0
    for node in graph.nodes:
        if node.outputs:
            size[node.outputs[0]] = math.prod(node.shape)
            live += math.prod(node.shape)
        most = max(most, live)
        live -= sum(size.get(value, 0) for value in {*node.inputs, *node.outputs} if last[value] == node.index)
    itemsize = max((leaf.element_size() for leaf in graph.example if isinstance(leaf, Tensor)), default=4)
    return max(1, most * itemsize // graph.batch)
