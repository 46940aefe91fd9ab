"""Forward passes that stop at layers: all batches wait at one layer, and go on together once that has been refitted."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunekit.restoration.samples import LayerCall
from prunekit.restoration.streams import Join, Watch
from prunekit.surgery import Graph
from prunekit.surgery.copying import copied, named_tensors


@dataclass(frozen=True)
class Stop:
    """A layer where a pass waits: what it read, what it has given if it has run, and the stream that it adds into."""

    layer: str
    call: LayerCall
    output: Tensor | None
    stream: Tensor | None


class _Closed(BaseException):
    """Exception thrown into a forward pass that is not to go on."""


class Walk(Watch):
    """One forward pass of `model` on `images`, that stops at `joins.keys()`, layers, before or after they run.

    Its thread only remembers where the forward is: every op is computed by the thread that calls `advance`, one at a
    time, so that no pass has workers of its own.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, joins: Mapping[str, Join | None], images: Tensor, late: bool
    ) -> None:
        super().__init__(model, graph, joins, joins.values())
        # what modules note in themselves stays with the pass; parameters and buffers are those of all
        self._model = copied(model, {id(tensor): tensor for tensor in named_tensors(model).values()})
        self._images, self._joins, self._late = images, joins, late
        self._made: list[weakref.ref[Tensor]] = []
        self._turn, self._posted = threading.Semaphore(0), threading.Semaphore(0)
        self._message: Any = None
        self._answer: Any = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def advance(self) -> Stop | None:
        """Go on to the next layer; None at the end. What the forward raises is raised here."""
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._images.device.type, enabled=False):
            return self._advance()  # whatever the caller is in, the forward's own thread is in none of these

    def _advance(self) -> Stop | None:
        while True:
            self._turn.release()
            self._posted.acquire()
            message, self._message = self._message, None
            if message is None or isinstance(message, Stop):
                return message
            if isinstance(message, BaseException):
                raise message
            self._answer = message()

    def close(self) -> None:
        """Close the walk: it goes no further."""
        self._closed = True
        self._turn.release()
        self._thread.join()

    def before(self, layer: str, call: LayerCall) -> None:
        """Stop there, or go on."""
        if not self._late:
            self._post(Stop(layer, call, None, self.take(self._joins[layer])))

    def after(self, layer: str, call: LayerCall, output: Tensor) -> None:
        """Stop there, or go on."""
        if self._late:
            self._post(Stop(layer, call, output, self.take(self._joins[layer])))

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Have the op computed by the other thread. Views compute nothing, and belong to where their base was seen."""
        if func.is_view:
            return func(*args, **kwargs)

        def run() -> Any:
            try:
                return func(*args, **kwargs), None
            except Exception as error:
                return None, error

        self._post(run)
        (out, error), self._answer = self._answer, None
        if error is not None:
            raise error
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out

    def live_bytes(self) -> int:
        """Return what the forward holds at this moment, of all that it has computed, in bytes."""
        alive = [tensor for tensor in (made() for made in self._made) if tensor is not None]
        sizes = {part.data_ptr(): part.nbytes() for part in (tensor.untyped_storage() for tensor in alive)}
        own = {tensor.untyped_storage().data_ptr() for tensor in named_tensors(self._model).values()}
        return sum(size for place, size in sizes.items() if place not in own)

    def _post(self, message: Any) -> None:
        if not self._closed:
            self._message = message
            self._posted.release()
            self._turn.acquire()
        if self._closed:
            raise _Closed

    def _work(self) -> None:
        self._turn.acquire()
        try:
            if not self._closed:
                with torch.no_grad(), self:
                    self._model(self._images)
        except _Closed:
            return
        except BaseException as error:
            self._message = error
        self._posted.release()
