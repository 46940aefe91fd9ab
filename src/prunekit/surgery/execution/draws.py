"""Forwards that draw random numbers: a network and its pruned copy must be given the same ones to be comparable.

Before each draw the generators are set anew, so that it does not matter how much was drawn before. A draw along pruned
channels is made once, at full width; the pruned network gets what belongs to the channels that it has left.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunekit.devices import forked_generators, seed_generators
from prunekit.errors import SurgeryError
from prunekit.surgery.execution.dispatch import DispatchMode, op_name, run_op

_SEED = 1_000_003
# Ops whose draws depend on nothing but a shape, given as the first operand, and on plain numbers.
_PURE = frozenset(
    (
        *("rand_like", "randn_like", "randint_like", "normal", "uniform", "exponential", "bernoulli", "random"),
        *("cauchy", "log_normal", "geometric"),
    )
)


def is_random(func: Any) -> bool:
    """Return whether an op draws random numbers.

    Attention, which may drop some weights, draws the same in any network.
    """
    return torch.Tag.nondeterministic_seeded in func.tags and not op_name(func).startswith("_scaled_dot_product")


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the state of the generators outside as it is, whatever random numbers are drawn inside."""
    python, numpy = random.getstate(), np.random.get_state()
    with forked_generators(device):
        start_over(device)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def start_over(device: torch.device) -> None:
    """Bring the generators of Python, NumPy and PyTorch into the same state each time."""
    random.seed(_SEED)
    np.random.seed(_SEED)
    seed_generators(device, _SEED)


class Draws:
    """Random numbers that one run at full width has drawn along channels that are to go, and what is left of them.

    `classes` are those of `Graph.draws`, one entry a draw; `kept` says which stay.
    """

    def __init__(self, classes: tuple[NDArray[np.int64], ...], kept: NDArray[np.bool_], device: torch.device) -> None:
        self.device = device
        self.any = False
        self.noise: dict[int, Tensor] = {}
        self._stays = [kept[labels] for labels in classes]

    def left(self, number: int, rank: int) -> dict[int, NDArray[np.int64]]:
        """Return the indices that stay, for each dimension of a draw along which some of it goes."""
        stays = self._stays[number] if number < len(self._stays) else np.ones((), dtype=np.bool_)
        if stays.all() or stays.ndim != rank:
            return {}
        along = {d: stays.any(axis=tuple(i for i in range(rank) if i != d)) for d in range(rank)}
        return {d: np.flatnonzero(line) for d, line in along.items() if not line.all()}


class DrawAgain(DispatchMode):
    """Mode that runs every op, giving those that draw random numbers the same ones in each run.

    At full width the draws are noted; with `narrow` the part that is left of them is given out.
    """

    def __init__(self, draws: Draws, *, narrow: bool) -> None:
        super().__init__()
        self.draws = draws
        self._narrow = narrow
        self._count = 0  # of all draws
        self._next = 0  # of those that may be along channels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run an op of the network."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return run_op(func, args, kwargs)
        self._count += 1
        self.draws.any = True
        seed_generators(self.draws.device, _SEED + self._count)
        with _reseeded(kwargs.get("generator"), self._count):
            return self._draw(func, args, kwargs) if is_random(func) else func(*args, **kwargs)

    def _draw(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        number, self._next = self._next, self._next + 1
        first = args[0] if args and isinstance(args[0], Tensor) else None
        left = {} if first is None else self.draws.left(number, first.dim())
        if first is None or not left:
            return func(*args, **kwargs)
        name, in_place = op_name(func), func._schema.name.endswith("_")
        others = [value for value in args[1:] if isinstance(value, Tensor)]
        if name in _PURE and not others and (in_place or name.endswith("_like")):
            found = self._noise(number, func(*args, **kwargs), left)
            return first.copy_(found) if in_place else found
        if name == "bernoulli":
            chance = others[0] if others else first
            found = (self._noise(number, torch.rand_like(chance), left) < chance).to(first.dtype)
            return first.copy_(found) if in_place else found
        if name == "native_dropout":
            mask = self._noise(number, torch.rand_like(first), left) >= args[1]
            return first * mask / max(1 - args[1], 1e-30), mask
        raise SurgeryError(f"'{name}' draws random numbers along pruned channels in a way that cannot be drawn again")

    def _noise(self, number: int, drawn: Tensor, left: Mapping[int, NDArray[np.int64]]) -> Tensor:
        """Return this run's part of a draw; `drawn` has the shape it asked for."""
        if not self._narrow:
            self.draws.noise[number] = drawn.clone()
            return drawn
        part = self.draws.noise[number]
        for dim, index in left.items():
            part = part.index_select(dim, torch.from_numpy(index).to(part.device))
        if part.shape != drawn.shape:
            raise SurgeryError(
                f"the pruned network draws random numbers of shape {tuple(drawn.shape)}, not {tuple(part.shape)}"
            )
        return part.to(drawn.dtype)


@contextlib.contextmanager
def _reseeded(generator: torch.Generator | None, number: int) -> Iterator[None]:
    """Make a generator of the network's own draw what the others do; afterwards it is as it was."""
    if generator is None:
        yield
        return
    state = generator.get_state()
    generator.manual_seed(_SEED + number)
    try:
        yield
    finally:
        generator.set_state(state)
