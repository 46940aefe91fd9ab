"""Two networks on the same images, layer by layer, in bounded memory.

Of each batch a pass of either network waits at the layer that is being refitted: what these passes hold is the
frontier, and no layer is computed twice. Where it is too large for all images, which is so in the first layers, further
ones join as soon as there is room for them: they pass the layers that have been refitted by then without a stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor, nn

from prunekit.errors import InputError, SurgeryError
from prunekit.restoration.images import bytes_per_image
from prunekit.restoration.plain_layers import reads
from prunekit.restoration.refit_targets import Site
from prunekit.restoration.walk import Stop, Walk
from prunekit.surgery import Graph

BATCH = 128  # images that pass at a time, at most
_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


@dataclass(frozen=True)
class Arrival:
    """A batch at a layer, in both networks: the original has run it, the pruned one is about to."""

    original: Stop
    small: Stop


class Frontier:
    """The passes of `original` and `small` on `images` at one site after the other; use it in a `with`."""

    def __init__(
        self, original: nn.Module, small: nn.Module, graph: Graph, sites: Sequence[Site], images: Tensor, memory: int
    ) -> None:
        self._networks, self._graph, self._images = (original, small), graph, images
        called = [site for site in sites if reads(graph, site.layer)]
        self._sites = sorted(called, key=lambda site: reads(graph, site.layer)[0].index)
        self._order = {site.layer: number for number, site in enumerate(self._sites)}
        self._batch = max(1, min(BATCH, len(images), memory // 4 // bytes_per_image(graph)))
        self._memory = memory
        self._pairs: list[tuple[_Pass, _Pass]] = []
        self.taken = 0

    def __enter__(self) -> Frontier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pair in self._pairs:
            for one in pair:
                one.walk.close()

    def arrivals(self) -> Iterator[tuple[Site, list[Arrival]]]:
        """Yield each site, in execution order, and what arrives there of each batch; none where a pass misses it."""
        room = self._room()
        for number, site in enumerate(self._sites):
            for pair in self._pairs:
                self._reach(pair, number)
            while self.taken < min(len(self._images), room[number]):
                self._admit(min(self._batch, room[number] - self.taken))
                self._reach(self._pairs[-1], number)
            yield site, self._arrived(number)

    def _arrived(self, number: int) -> list[Arrival]:
        here: list[Arrival] = []
        for original, small in self._pairs:
            if original.number != number or small.number != number:
                return []
            assert original.stop is not None
            assert small.stop is not None
            here.append(Arrival(original.stop, small.stop))
        return here

    def _admit(self, count: int) -> None:
        images = self._images[self.taken : self.taken + count]
        original, small = self._networks
        self._pairs.append((self._pass(original, images, late=True), self._pass(small, images, late=False)))
        self.taken += len(images)

    def _pass(self, model: nn.Module, images: Tensor, *, late: bool) -> _Pass:
        joins = {site.layer: site.join for site in self._sites}
        return _Pass(Walk(model, self._graph, joins, images, late=late), self._order)

    def _reach(self, pair: tuple[_Pass, _Pass], number: int) -> None:
        """Let a batch go on to a site, in both networks.

        Raises:
            InputError: the original fails on it.
            SurgeryError: only the pruned network does.
        """
        self._reach_original(pair[0], number)
        try:
            pair[1].reach(number)
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

    def _room(self) -> list[int]:
        """Return how many images may be at each site and all behind it, by what one holds there in the original."""
        if self._memory >= 8 * len(self._images) * bytes_per_image(self._graph):
            return [len(self._images)] * len(self._sites)
        alone, held = self._pass(self._networks[0], self._images[:1], late=True), []
        try:
            for number in range(len(self._sites)):
                self._reach_original(alone, number)
                held.append(2 * alone.walk.live_bytes())
        finally:
            alone.walk.close()
        room, least = list[int](), len(self._images)
        for size in reversed(held):
            least = min(least, max(1, self._memory // max(1, size)))
            room.append(least)
        return room[::-1]


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


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
