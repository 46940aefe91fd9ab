"""Forward passes that stop at layers: all batches wait at one layer, and go on together once that has been refitted."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunekit.restoration.images import Inputs, tensors_of
from prunekit.restoration.samples import LayerCall
from prunekit.restoration.spilling import Spill
from prunekit.restoration.streams import Join, Watch
from prunekit.surgery.copying import copied, named_tensors
from prunekit.surgery.graph.recording import Node


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

    With `spill`, what it has computed and holds may be put there between two stops; it fetches what it reads.

    Its thread only remembers where the forward is: every op is computed by the thread that calls `advance`, one at a
    time, so that no pass has workers of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        nodes: Sequence[Node],
        joins: Mapping[str, Join | None],
        images: Tensor | Inputs,
        *,
        late: bool,
        spill: Spill | None = None,
    ) -> None:
        super().__init__(model, nodes, joins, joins.values())
        # what modules note in themselves stays with the pass; parameters and buffers are those of all
        shared = named_tensors(model).values()
        self._model = copied(model, {id(tensor): tensor for tensor in shared})
        self._images, self._joins, self._late, self._spill = tensors_of(images), joins, late, spill
        self._given = {tensor.untyped_storage().data_ptr() for tensor in (*self._images, *shared)}
        self._made: list[weakref.ref[Tensor]] = []
        self._turn, self._posted = threading.Semaphore(0), threading.Semaphore(0)
        self._message: Any = None
        self._answer: Any = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def advance(self) -> Stop | None:
        """Go on to the next layer; None at the end. What the forward raises is raised here."""
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._images[0].device.type, enabled=False):
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
        """Have the op computed by the other thread. Views compute nothing."""
        if self._spill is not None:
            for given in tree_leaves((args, kwargs)):
                if isinstance(given, Tensor):
                    self._spill.fetch(given)
        out = func(*args, **kwargs) if func.is_view else self._computed(func, args, kwargs)
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        def run() -> Any:
            try:
                return func(*args, **kwargs), None
            except Exception as error:
                return None, error

        self._post(run)
        (out, error), self._answer = self._answer, None
        if error is not None:
            raise error
        return out

    def held(self) -> list[list[Tensor]]:
        """Return what the forward holds in memory of all that it has computed, those together that share a storage."""
        alive = {id(made): made for ref in self._made if (made := ref()) is not None}.values()
        self._made = [weakref.ref(tensor) for tensor in alive]
        shared: dict[int, list[Tensor]] = {}
        for tensor in alive:
            shared.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        return [tensors for place, tensors in shared.items() if place and place not in self._given]

    def bytes_held(self) -> int:
        """Return the bytes of all that is `held`."""
        return sum(tensors[0].untyped_storage().nbytes() for tensors in self.held())

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
                    self._model(*self._images)
        except _Closed:
            return
        except BaseException as error:
            self._message = error
        self._posted.release()
