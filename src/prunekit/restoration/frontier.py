"""Two networks on the same images, layer by layer, in bounded memory.

Of each batch a pass of either network waits at the layer that is being refitted: what these passes hold is the
frontier, and no layer is computed twice. What of it is more than is to be held in memory waits in a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor, nn

from prunekit.errors import InputError, SurgeryError
from prunekit.restoration.images import Inputs, bytes_per_image, in_batches
from prunekit.restoration.plain_layers import reads
from prunekit.restoration.refit_targets import Site
from prunekit.restoration.spilling import Spill
from prunekit.restoration.walk import Stop, Walk
from prunekit.surgery import Graph
from prunekit.surgery.graph.blocks import ResidualBlock, nodes_left

BATCH = 128  # images that pass at a time, at most
_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


@dataclass(frozen=True)
class Arrival:
    """A batch of `images` images at a layer, in both networks: the original has run it, the pruned one is about to."""

    images: int
    original: Stop
    small: Stop


class Frontier:
    """The passes of `original` and `small` on `images` at one site after the other; use it in a `with`."""

    def __init__(
        self,
        original: nn.Module,
        small: nn.Module,
        graph: Graph,
        sites: Sequence[Site],
        images: Tensor | Inputs,
        memory: int,
        skipped: Sequence[ResidualBlock] = (),
    ) -> None:
        self._graph, self._images = graph, images
        self._networks = (original, graph.nodes), (small, nodes_left(graph, skipped))
        called = [site for site in sites if reads(graph, site.layer)]
        self._sites = sorted(called, key=lambda site: reads(graph, site.layer)[0].index)
        self._order = {site.layer: number for number, site in enumerate(self._sites)}
        self._batch = max(1, min(BATCH, len(images), memory // 4 // bytes_per_image(graph)))
        self._memory = memory
        self._spill = Spill()
        self._pairs: list[_Pair] = []

    @property
    def images(self) -> int:
        """The number of images."""
        return len(self._images)

    def __enter__(self) -> Frontier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pair in self._pairs:
            pair.close()
        self._spill.close()

    def arrivals(self) -> Iterator[tuple[Site, Iterator[Arrival | None]]]:
        """Yield each site, in execution order, and what arrives there, batch by batch: None where a pass misses it.

        An arrival is in memory until the next one.

        Raises:
            InputError: What waits does not fit on the disk.
        """
        self._check_disk()
        for images in in_batches(self._images, self._batch):
            self._pairs.append(_Pair(self._pass(images, late=True), self._pass(images, late=False), len(images)))
        for number, site in enumerate(self._sites):
            yield site, self._at(number)

    def _at(self, number: int) -> Iterator[Arrival | None]:
        for pair in self._pairs:
            self._reach(pair, number)
            yield pair.arrival(number, self._spill)
            pair.held = sum(one.walk.bytes_held() for one in (pair.original, pair.small))
            if sum(other.held for other in self._pairs) > self._memory:
                pair.put(self._spill)

    def _pass(self, images: Tensor | Inputs, *, late: bool) -> _Pass:
        joins = {site.layer: site.join for site in self._sites}
        model, nodes = self._networks[0 if late else 1]
        return _Pass(Walk(model, nodes, joins, images, late=late, spill=self._spill), self._order)

    def _reach(self, pair: _Pair, number: int) -> None:
        """Let a batch go on to a site, in both networks.

        Raises:
            InputError: the original fails on it.
            SurgeryError: only the pruned network does.
        """
        self._reach_original(pair.original, number)
        try:
            pair.small.reach(number)
        except _FAILURES as error:
            raise SurgeryError(
                f"the pruned network does not run on what the original does: {_brief(error)}",
                hint="its forward has sizes written into it; compute them from the input",
            ) from error

    def _reach_original(self, original: _Pass, number: int) -> None:
        try:
            original.reach(number)
        except _FAILURES as error:
            raise InputError(
                f"the network fails on {self._batch} calibration images at once: {_brief(error)}",
                hint="pass fewer images",
            ) from error

    def _check_disk(self) -> None:
        """Check that what does not fit into memory fits on the disk, by what one image holds in the original."""
        if self._memory >= 8 * len(self._images) * bytes_per_image(self._graph):
            return
        alone, most = self._pass(self._images[:1], late=True), 0
        try:
            for number in range(len(self._sites)):
                self._reach_original(alone, number)
                most = max(most, 2 * alone.walk.bytes_held())
        finally:
            alone.walk.close()
        self._spill.check(max(0, most * len(self._images) - self._memory))


class _Pass:
    """A walk, and the number of the site where it waits: -1 before the first, infinite at the end."""

    def __init__(self, walk: Walk, order: dict[str, int]) -> None:
        self.walk, self.number = walk, -1.0
        self.stop: Stop | None = None
        self._order = order

    def reach(self, number: int) -> None:
        """Go on to a site, or to the first one behind it that comes by."""
        while self.number < number:
            self.stop = None  # what it holds is not to outlive the layer
            stop = self.walk.advance()
            self.stop = stop
            self.number = float("inf") if stop is None else self._order[stop.layer]


class _Pair:
    """The passes of a batch, and what they hold in memory, in bytes."""

    def __init__(self, original: _Pass, small: _Pass, images: int) -> None:
        self.original, self.small, self._images = original, small, images
        self.held = 0

    def arrival(self, number: int, spill: Spill) -> Arrival | None:
        """Return what has arrived at a site, fetched into memory."""
        original, small = self.original.stop, self.small.stop
        if original is None or small is None or (self.original.number, self.small.number) != (number, number):
            return None
        for tensor in (original.output, original.stream, small.call.x, small.stream):
            if tensor is not None:
                spill.fetch(tensor)
        return Arrival(self._images, original, small)

    def put(self, spill: Spill) -> None:
        """Move what the passes hold into the file."""
        for tensors in (*self.original.walk.held(), *self.small.walk.held()):
            spill.put(tensors)
        self.held = 0

    def close(self) -> None:
        """Close the passes."""
        self.original.walk.close()
        self.small.walk.close()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
