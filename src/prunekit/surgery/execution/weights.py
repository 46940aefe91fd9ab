"""Weights followed through a forward, to the operations that read channels through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from prunekit.surgery.copying import named_tensors
from prunekit.surgery.execution.dispatch import op_name
from prunekit.surgery.execution.draws import DrawAgain, Draws
from prunekit.surgery.ops import COPIES, RESHAPES, Reading, readings

Key = tuple[str, int]  # a parameter and one of its dimensions


class FollowWeights(DrawAgain):
    """Mode that calls `read` wherever an op reads channels through one of `keys`; `seen` are those it met.

    Weights are known by what they are, not by where they are used: through views and copies too. For this each has
    beside it, for each of its dimensions among `keys`, the index of every element along it.
    """

    def __init__(self, network: nn.Module, keys: Iterable[Key], draws: Draws) -> None:
        super().__init__(draws, narrow=False)
        self.seen: set[Any] = set()
        self._places = cast(Any, WeakIdKeyDictionary())
        tensors = named_tensors(network)
        with torch._C.DisableTorchFunction():
            for name, dim in keys:
                known = self._places.get(tensors[name], {})
                self._places[tensors[name]] = {**known, (name, dim): _numbered(tensors[name], dim)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, once `read` has seen what it reads."""
        kwargs, op = kwargs or {}, op_name(func)
        with torch._C.DisableTorchFunction():  # what is done here is no business of a mode around the network
            added = None
            for reading in readings(op, args):
                args, added = self._read(func, reading, args)
            out = self.run(func, args, kwargs)
            out = out if added is None else out + added
            self._follow(func, op, args, kwargs, out)
        return out

    def read(self, func: Any, reading: Reading, args: Any, key: Key, line: Tensor) -> tuple[Any, Tensor | None]:
        """Return the arguments for an op that reads through `key`, and what is to be added to its result, if anything.

        `line` says which index of the weight each channel meets.
        """
        raise NotImplementedError

    def _read(self, func: Any, reading: Reading, args: Any) -> tuple[Any, Tensor | None]:
        for key, numbers in self._places.get(args[reading.weight], {}).items():
            line = numbers[tuple(slice(None) if d == reading.into else 0 for d in range(numbers.dim()))]
            if line.numel() > 1 and int(line[0]) != int(line[1]):
                self.seen.add(key)
                return self.read(func, reading, args, key, line)
        return args, None

    def _follow(self, func: Any, op: str, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        """Follow a weight through views and copies, and through what is computed from it element by element."""
        for arg in args:
            places = self._places.get(arg) if isinstance(arg, Tensor) else None
            if places is not None:
                self._note(func, op, arg, places, args, kwargs, out)
                return

    def _note(self, func: Any, op: str, arg: Tensor, places: Any, args: Any, kwargs: Any, out: Any) -> None:
        first = out[0] if isinstance(out, list | tuple) and out else out
        if op in _ELEMENTWISE or torch.Tag.pointwise in func.tags:
            if isinstance(first, Tensor) and first.shape == arg.shape:
                self._places[first] = places
        elif op in RESHAPES:
            self._places[out] = {key: numbers.reshape(out.shape) for key, numbers in places.items()}
        elif func.is_view:
            views = {key: func(numbers, *args[1:], **kwargs) for key, numbers in places.items()}
            for number, result in enumerate([out] if isinstance(out, Tensor) else out):
                self._places[result] = {k: v if isinstance(v, Tensor) else v[number] for k, v in views.items()}


def _numbered(tensor: Tensor, dim: int) -> Tensor:
    """Return, for each element of a tensor, its index along `dim`."""
    return torch.arange(tensor.size(dim)).reshape(-1, *[1] * (tensor.dim() - dim - 1)).expand(tensor.shape)


_ELEMENTWISE = frozenset((*COPIES, "_to_copy", "lift_fresh", "_weight_norm_interface"))
