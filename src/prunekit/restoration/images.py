"""Calibration images: read once, without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.surgery import Graph


@dataclass(frozen=True)
class Inputs:
    """What a network with several inputs reads of some examples: for each of its arguments a tensor `(N, ...)`.

    They are counted, sliced and cut into batches together, as one tensor of images is.
    """

    parts: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: slice) -> Inputs:
        return Inputs(tuple(part[index] for part in self.parts))


Images = Tensor | Iterable[Any]
"""Unlabelled, normalised images: one tensor `(N, C, H, W)`, or batches of them.

Of a network with several inputs: a tuple of tensors `(N, ...)`, one for each, or batches of such.
"""

LabelledImages = Iterable[tuple[Tensor, Tensor]]
"""Batches of normalised images `(N, C, H, W)` and their labels `(N,)`."""

MEMORY = 4 << 30  # bytes of activations
_PART = 16  # images that are checked at a time: a check takes more memory than they do


def tensors_of(images: Tensor | Inputs) -> tuple[Tensor, ...]:
    """Return what a forward is given, in order."""
    return images.parts if isinstance(images, Inputs) else (images,)


def in_batches(images: Tensor | Inputs, size: int) -> Iterator[Tensor | Inputs]:
    """Yield `size` images at a time, the last ones perhaps fewer."""
    for start in range(0, len(images), size):
        yield images[start : start + size]


def gather(images: Images | Inputs, model: nn.Module, graph: Graph, most: int | None = None) -> Tensor | Inputs:
    """Return the images in the model's type and on its device, or `most` of them.

    `images` are normalised, `(N, C, H, W)`: one tensor, or batches. For a network with several inputs they are a tuple
    of tensors `(N, ...)`, or batches of these.

    Raises:
        InputError: no images, of another shape than the network was read with, or not finite.
    """
    if not reads_tensors(graph):
        raise InputError("only a network whose inputs are tensors can be calibrated on images")
    shapes = [tuple(given.shape[1:]) for given in graph.example]
    like = next(p for p in model.parameters() if p.is_floating_point())
    parts: list[tuple[Tensor, ...]] = []
    left = most
    for batch in _batches(images, len(shapes)):
        given = _checked(batch, shapes)
        parts.append(tuple(_as_read(one[:left], like) for one in given))
        left = None if left is None else left - len(given[0])
        if left is not None and left <= 0:
            break
    if not sum(len(given[0]) for given in parts):
        raise InputError("there are no calibration images", hint="--data names them; a few hundred are enough")
    joined = parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return joined[0] if len(joined) == 1 else Inputs(joined)


def _batches(images: Images | Inputs, inputs: int) -> Iterable[Any]:
    """Return the batches for a network with so many inputs; what is one batch alone."""
    if isinstance(images, Tensor | Inputs):
        return [images]
    alone = inputs > 1 and isinstance(images, tuple) and all(isinstance(one, Tensor) for one in images)
    return [images] if alone else images


def _as_read(given: Tensor, like: Tensor) -> Tensor:
    """Return an input where the network is, and in its type where it has numbers with fractions."""
    return given.to(like) if given.is_floating_point() else given.to(like.device)


def without_labels(images: Images | LabelledImages) -> Images:
    """Return images without the labels that may come with them."""
    if isinstance(images, Tensor):
        return images
    return [batch if isinstance(batch, Tensor) else batch[0] for batch in images]


def reads_images(graph: Graph) -> bool:
    """Return whether the network's input is one tensor, as a batch of images is."""
    return len(graph.example) == 1 and reads_tensors(graph)


def reads_tensors(graph: Graph) -> bool:
    """Return whether all of the network's inputs are tensors."""
    return all(isinstance(given, Tensor) for given in graph.example)


def _checked(batch: object, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    given = batch.parts if isinstance(batch, Inputs) else batch if isinstance(batch, tuple | list) else (batch,)
    found = [tuple(one.shape[1:]) if isinstance(one, Tensor) else f"a {type(one).__name__}" for one in given]
    if found != list(shapes) or len({len(one) for one in given}) > 1:
        single = len(shapes) == 1
        raise InputError(
            f"calibration images have shape {_said(found)}; the network reads {_said(shapes)}",
            hint="pass normalised images as a tensor (N, C, H, W), or batches of them without labels"
            if single
            else "pass a tuple of tensors (N, ...), one for each input and as many of each, or batches of such",
        )
    if not all(bool(torch.isfinite(part).all()) for one in given for part in torch.split(one, _PART)):
        raise InputError("the calibration images contain values that are not finite")
    return tuple(given)


def _said(shapes: Sequence[object]) -> str:
    return " and ".join(map(str, shapes))


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
