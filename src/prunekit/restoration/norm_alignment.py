"""Batch norms brought to the statistics of given images, as training mode would on all of them at once.

It takes no more memory for more images. They pass in batches that wait for one another at each batch norm, until it is
known what all of them give it. Where too much would wait, which is so in the first layers of a network for large
pictures, further batches start anew for each norm and are dropped there: such layers are few and near the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.devices import precise
from prunekit.errors import InputError
from prunekit.nn.norms import norms_of
from prunekit.progress import counter
from prunekit.restoration.images import Inputs, bytes_per_image
from prunekit.restoration.samples import LayerCall
from prunekit.restoration.walk import Stop, Walk
from prunekit.surgery import Graph
from prunekit.surgery.copying import copied

BATCH = 64  # images that pass at a time, at most
MEMORY = 2 << 30  # bytes that waiting passes hold, at most


def aligned(model: nn.Module, graph: Graph, images: Tensor | Inputs, *, memory: int = MEMORY) -> nn.Module:
    """Return a copy whose norms hold the statistics of `images` `(N, C, H, W)`: each sees what it was made to give.

    Args:
        model: The network that `graph` was read from, or one that surgery has made of it.
        graph: Its graph.
        images: Images that the network reads.
        memory: What waiting batches may hold, in bytes.

    Raises:
        InputError: the network takes another way for some images than for others.
    """
    subject = copied(model).eval()
    with torch.no_grad():
        _Alignment(subject, graph, images, memory).run()
    return subject


@dataclass(frozen=True)
class _Statistics:
    """Mean and variance, `(C,)` each, of the `count` values of each channel that batch norm `norm` was given."""

    norm: str
    mean: Tensor
    variance: Tensor
    count: int


class _Pass(Walk):
    """A forward pass that stops in front of each batch norm; `number` counts its stops from 0."""

    def __init__(self, model: nn.Module, graph: Graph, images: Tensor | Inputs) -> None:
        super().__init__(model, graph.nodes, {}, images, late=False)
        self.number = -1
        for name, norm in norms_of(self._model):
            norm.register_forward_pre_hook(partial(self._wait, name), with_kwargs=True)

    def _wait(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        self._post(Stop(name, LayerCall(x, x), None, None))


class _Alignment:
    """Batches that go from one norm of `subject` to the next, each with the statistics of all."""

    def __init__(self, subject: nn.Module, graph: Graph, images: Tensor | Inputs, memory: int) -> None:
        self._subject, self._graph, self._images, self._memory = subject, graph, images, memory
        self._norms = dict(norms_of(subject))
        self._batch = max(1, min(BATCH, memory // 4 // bytes_per_image(graph)))
        self._order: list[str] = []
        self._found: list[_Statistics] = []
        self._waiting: list[_Pass] = []

    def run(self) -> None:
        """Bring the norms to the statistics, in the order in which they run."""
        room, taken, count = self._room(), 0, counter("measuring batch norms")
        try:
            for number, most in enumerate(room):
                parts = [self._statistics(one, number) for one in self._waiting]
                while taken < most:
                    self._waiting.append(self._pass(taken, min(taken + self._batch, most)))
                    taken += self._batch
                    parts.append(self._statistics(self._waiting[-1], number))
                for start in range(taken, len(self._images), self._batch):
                    once = self._pass(start, start + self._batch)
                    parts.append(self._statistics(once, number))
                    once.close()
                self._found.append(_together(parts))
                count(number + 1, len(room))
        finally:
            for one in self._waiting:
                one.close()
        for found in self._found:
            self._set(found, found.count / max(1, found.count - 1))

    def _pass(self, start: int, end: int) -> _Pass:
        return _Pass(self._subject, self._graph, self._images[start:end])

    def _room(self) -> list[int]:
        """Return how many images may wait at each norm and all behind it, by what one holds; whole batches."""
        alone, held = self._pass(0, 1), list[int]()
        while (stop := alone.advance()) is not None:
            self._order.append(stop.layer)
            held.append(alone.bytes_held())
        room, least = list[int](), len(self._images)
        for size in reversed(held):
            fitting = self._memory // max(1, size) // self._batch * self._batch
            least = min(least, fitting)
            room.append(least)
        return room[::-1]

    def _statistics(self, one: _Pass, number: int) -> _Statistics:
        """Let a pass go on to a norm, and return the statistics of what it gives it.

        Raises:
            InputError: it passes other norms than the one before it.
        """
        stop: Stop | None = None
        while one.number < number:
            if one.number >= 0:  # norms share their buffers, and one may be used twice
                self._set(self._found[one.number])
            stop = None  # what it holds is not to outlive the norm
            stop = one.advance()
            one.number += 1
            if stop is None or stop.layer != self._order[one.number]:
                raise InputError("the network takes another way for some images than for others")
        assert stop is not None
        x = stop.call.x
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, 0).flatten(1)
        variance, mean = torch.var_mean(wide, 1, correction=0)
        return _Statistics(stop.layer, precise(mean), precise(variance), wide.size(1))

    def _set(self, found: _Statistics, factor: float = 1.0) -> None:
        norm: Any = self._norms[found.norm]
        norm.running_mean.copy_(found.mean)
        norm.running_var.copy_(found.variance * factor)


def _together(parts: Sequence[_Statistics]) -> _Statistics:
    """Return the statistics of all values, from those of parts of them."""
    count = sum(part.count for part in parts)
    mean = torch.stack([part.mean * (part.count / count) for part in parts]).sum(0)
    each = [(part.variance + (part.mean - mean).square()) * (part.count / count) for part in parts]
    return _Statistics(parts[0].norm, mean, torch.stack(each).sum(0), count)
