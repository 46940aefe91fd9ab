"""Matching what a network computes on the way with what its teacher does: the outputs of the blocks that both have.

A pruned network keeps the shapes that its parts exchange, wherever only the channels inside them went: the outputs of
residual blocks, of stages, of transformer layers. There its teacher says exactly what is wanted, at every position of
every image, where labels say one number an image. So few images teach much (compare "FitNets", Romero et al., ICLR
2015, which needs a learnt map between the shapes; here they are the same).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_VARIANCE = 1e-6
_AKIN = 0.5  # correlation; between networks that were trained apart it is near zero
_STATE = "matched blocks"


class Matching:
    """Remembers what the blocks of a student and of its teacher gave for the latest images, and compares them.

    A block is a module with parts of its own, of the same name in both networks; it counts where its output is one
    tensor, of one shape in both. Where a block ends with its last part, both give the same tensor, which counts once.
    On the first images it is settled which blocks do the same in both, by the correlation of what they give: a teacher
    that was trained apart from the student has other features in the same places, which are nothing to aim at.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        shared = _blocks(student).keys() & _blocks(teacher).keys()
        self._names = sorted(shared)
        self._akin: frozenset[str] | None = None
        self._student, self._teacher = dict[str, Tensor](), dict[str, Tensor]()
        self._hooks = [
            block.register_forward_hook(partial(_note, found, name))
            for network, found in ((student, self._student), (teacher, self._teacher))
            for name, block in _blocks(network).items()
            if name in shared
        ]

    def distance(self) -> Tensor | None:
        """Return the mean over the blocks of the squared difference, in shares of the variance in the teacher.

        Only the latest forward passes of both count, and only once; None where no block can be compared.
        """
        pairs = self._pairs()
        self._student.clear()
        self._teacher.clear()
        if self._akin is None:
            self._akin = frozenset(name for name, pair in pairs.items() if _correlation(*pair) > _AKIN)
        counted = [_relative(*pair) for name, pair in pairs.items() if name in self._akin]
        return torch.stack(counted).mean() if counted else None

    def state(self) -> dict[str, Tensor]:
        """Return which blocks are compared, once that is settled, as a tensor."""
        if self._akin is None:
            return {}
        return {_STATE: torch.tensor([name in self._akin for name in self._names])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        if _STATE in state:
            chosen = state[_STATE].tolist()
            self._akin = frozenset(name for name, one in zip(self._names, chosen, strict=True) if one)

    def close(self) -> None:
        """Leave the networks alone."""
        for hook in self._hooks:
            hook.remove()

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what each block gave in both, by its name."""
        once = {id(ours): name for name, ours in self._student.items()}
        found = ((name, self._student[name], self._teacher.get(name)) for name in once.values())
        return {
            name: (ours, wanted) for name, ours, wanted in found if wanted is not None and ours.shape == wanted.shape
        }


def _blocks(network: nn.Module) -> Mapping[str, nn.Module]:
    """Return the modules with parts of their own, but for the whole, whose output is compared as an answer."""
    return {name: module for name, module in network.named_modules() if name and any(module.children())}


def _note(found: dict[str, Tensor], name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.is_floating_point():
        found[name] = output


def _relative(ours: Tensor, wanted: Tensor) -> Tensor:
    wide = torch.promote_types(wanted.dtype, torch.float32)
    wanted = wanted.to(wide)
    return (ours.to(wide) - wanted).square().mean() / wanted.var(correction=0).clamp_min(_LEAST_VARIANCE)


@torch.no_grad()
def _correlation(ours: Tensor, wanted: Tensor) -> Tensor:
    """Return the correlation of all values of two outputs, each without its mean over images and positions."""
    both = []
    for output in (ours, wanted):
        spread = output.to(torch.float32)
        spread = spread.flatten(2) if spread.dim() > 2 else spread.unsqueeze(-1)
        both.append((spread - spread.mean((0, 2), keepdim=True)).flatten())
    return nn.functional.cosine_similarity(both[0], both[1], dim=0)
