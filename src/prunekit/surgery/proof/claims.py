"""Claims of a plan: what removed channels are worth to each of their readers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import SurgeryError
from prunekit.plan import Fold
from prunekit.surgery.editing.carriers import CarrierFinder
from prunekit.surgery.editing.compensation import reader
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.labels import Ids
from prunekit.surgery.graph.resolved import ResolvedPlan


@dataclass(frozen=True)
class Combination:
    """Units that are worth a combination of others: `matrix @ x[kept]`, at each of the places that units have.

    `removed` and `kept` are the units' indices along the weight, `(units, places)`.
    """

    matrix: Tensor
    removed: Ids
    kept: Ids


@dataclass(frozen=True)
class Worth:
    """Worth of what is read through one dimension of one weight: `gone` are the indices along it that are removed.

    `constants` has an entry for each channel of the activation, or is None where all are zero.
    """

    gone: Ids
    combinations: tuple[Combination, ...] = ()
    constants: Tensor | None = None

    def put(self, x: Tensor, channels: int, line: Tensor) -> Tensor:
        """Return `x` with its removed channels at what they are worth.

        `line` says which index of the weight each channel along dimension `channels` is read through; in grouped
        convolutions each group is read through the same ones.
        """
        repeats, width = x.size(channels) // line.numel(), line.numel()
        plain = torch.equal(line, torch.arange(width))
        if not plain and (self.combinations or self.constants is not None):
            raise SurgeryError("folds into a part of a weight cannot be verified")
        gone = _repeated(np.flatnonzero(np.isin(line.numpy(), self.gone)), repeats, width).to(x.device)
        result = x.clone().index_fill_(channels, gone, 0.0)
        for one in self.combinations:
            source, target = (_repeated(p, repeats, width).to(x.device) for p in (one.kept, one.removed))
            read = x.index_select(channels, source.flatten()).movedim(channels, -1)
            read = read.reshape(*read.shape[:-1], *source.shape)  # (..., kept, places)
            made = torch.einsum("...kp,rk->...rp", read, one.matrix.to(x)).flatten(-2).movedim(-1, channels)
            result.index_copy_(channels, target.flatten(), made)
        if self.constants is not None:
            values = self.constants.to(x)[gone].reshape(-1, *[1] * (x.dim() - channels - 1))
            shape = list(x.shape)
            shape[channels] = gone.numel()
            result.index_add_(channels, gone, values.expand(shape))
        return result


def _repeated(places: Ids, repeats: int, width: int) -> Tensor:
    """Return indices along a weight as channels of an activation, of all groups, along the last dimension."""
    return torch.from_numpy(np.concatenate([places + group * width for group in range(repeats)], axis=-1))


def worths(model: nn.Module, resolved: ResolvedPlan) -> dict[tuple[str, int], Worth]:
    """Return, for each dimension of a parameter that loses indices, what they are worth to their readers."""
    graph, plan = resolved.graph, resolved.plan
    tables = [key for key in graph.slots if len(graph.shapes[key[0]]) > 1]  # nothing is read through a vector
    lost = {key: np.flatnonzero(~resolved.kept[graph.slots[key]]) for key in tables}
    found = {key: Worth(gone) for key, gone in lost.items() if gone.size}
    refitted = {f"{r.layer}.{leaf}" if r.layer else leaf for r in plan.refits for leaf in r.values}
    carriers = CarrierFinder(model, graph) if refitted and plan.folds else None
    for fold in plan.folds:
        member = reader(fold, graph)
        key = (member.parameter, member.dim)
        old = found.get(key)
        if old is None:
            continue
        combinations, constants = old.combinations, old.constants
        units = resolved.keeps.get(graph.group(fold.group).name)
        # what is refitted afterwards has the last word
        if fold.matrix is not None and units is not None and member.parameter not in refitted:
            combinations += (_combination(fold, graph, member.positions, member.units, units),)
        spent = carriers is not None and not refitted.isdisjoint(carriers.of(*key).targets)
        if fold.offset is not None and not spent:
            constants = fold.offset if constants is None else constants + fold.offset
        found[key] = Worth(old.gone, combinations, constants)
    return found


def _combination(fold: Fold, graph: Graph, positions: Ids, units: Ids, kept: tuple[int, ...]) -> Combination:
    assert fold.matrix is not None
    stays = np.zeros(graph.group(fold.group).size, dtype=np.bool_)
    stays[list(kept)] = True
    return Combination(
        fold.matrix, _places(positions, units, np.flatnonzero(~stays)), _places(positions, units, np.flatnonzero(stays))
    )


def _places(positions: Ids, units: Ids, wanted: Ids) -> Ids:
    """Return the positions of each wanted unit, `(units, places)`, in ascending order."""
    return np.stack([np.sort(positions[units == unit]) for unit in wanted])
