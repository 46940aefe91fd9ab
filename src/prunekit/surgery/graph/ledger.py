"""Facts about channel labels that are found while a network is recorded."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prunekit.surgery.graph.labels import Ids, Mask, channels_in, compact, distinct, ids, settle


@dataclass
class Ledger:
    """Facts about labels, collected while a network is recorded."""

    count: int = 1  # label 0 is taken: "no channel"
    pairs: list[tuple[Ids, Ids]] = field(default_factory=list)
    within: list[tuple[Ids, Ids]] = field(default_factory=list)  # pairs that hold only while heads go whole
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    cuts: list[Ids] = field(default_factory=list)  # equal parts of a tensor, one a row: (parts, channels)
    splits: list[Ids] = field(default_factory=list)  # channels laid out along several dimensions by a view
    given: list[tuple[int, int]] = field(
        default_factory=list
    )  # labels of parameters that no layer has made: [from, to)

    def fresh(self, number: int) -> Tensor:
        """Return `number` labels that nobody has used, shape `(number,)`."""
        start = self.count
        self.count += number
        return torch.arange(start, self.count)

    def fresh_given(self, number: int) -> Tensor:
        """Return labels for the entries of a parameter that no layer has made: so far they are nobody's channels."""
        self.given.append((self.count, self.count + number))
        return self.fresh(number)

    def is_given(self, labels: Tensor) -> bool:
        """Return whether all labels are of parameters alone, or none at all."""
        present = channels_in(labels)
        owned = np.zeros(present.size, dtype=np.bool_)
        for start, end in self.given:
            owned |= (present >= start) & (present < end)
        return bool(owned.all())

    def unify(self, a: Tensor, b: Tensor, where: str = "the model", *, whole: bool = False) -> None:
        """Note that the labels of `a` and `b`, equally shaped, name the same channels element by element.

        A channel that meets an element with no channel of ours (the input, a constant) may not go. With `whole` they
        are parts of one head, which goes whole unless its width is looked at (`inside.py`).
        """
        left, right = ids(a), ids(b)
        if np.array_equal(left, right):
            return
        alone = (left == 0) != (right == 0)
        if alone.any():
            stuck = distinct(np.maximum(left[alone], right[alone]))
            self.frozen.append((stuck, f"an operation in {where} with values that have fixed channels"))
            left, right = left[~alone], right[~alone]
        (self.within if whole else self.pairs).append((left, right))

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Note that no channel among `labels` may be removed; `reason` says which operation forbids it."""
        present = channels_in(labels)
        if present.size:
            self.frozen.append((present, reason))

    def cut(self, vector: Tensor, parts: int) -> None:
        """Note that `vector` (1-D) is cut into equal parts, as long as each other at any width.

        Channels at the same place of all parts are tied, unless `balance.py` finds that too strict.
        """
        self.cuts.append(self._parts(vector, parts))

    def split(self, vector: Tensor, sizes: Sequence[int]) -> None:
        """Note that `vector` (1-D) is laid out along dimensions of these sizes, of which one follows the width.

        Which one it is shows in what is done there: where everything at an index of one dimension is tied, as it is in
        front of a convolution that reads the others as positions, that one; else the last, as in `cut`.
        """
        parts = math.prod(sizes[:-1])
        if self._parts(vector, parts).shape[1] == sizes[-1]:
            self.splits.append(ids(vector).reshape(tuple(sizes)))
        else:
            self.cut(vector, parts)

    def _parts(self, vector: Tensor, parts: int) -> Ids:
        """Return the equal parts of a vector, without the places that have no channel of ours in any of them."""
        rows = ids(vector).reshape(parts, -1)
        ours = rows != 0
        alone = ours.any(axis=0) & ~ours.all(axis=0)
        if alone.any():
            stuck = distinct(rows[:, alone])
            self.frozen.append((stuck[stuck != 0], "a cut between channels and values that have fixed channels"))
        return rows[:, ours.all(axis=0)]

    @property
    def stretches(self) -> list[Ids]:
        """All that is cut into equal parts, one part a row: `(parts, channels)`."""
        if not self.splits:
            return self.cuts
        root = settle(self.count, [*self.pairs, *self.within])
        open_ = (labels for labels in self.splits if not _an_outer_one_follows(root[labels]))
        return [*self.cuts, *(labels.reshape(-1, labels.shape[-1]) for labels in open_)]

    def ties(self, loose: Mask) -> list[tuple[Ids, Ids]]:
        """Return every pair of labels that name one channel; labels in `loose` are not tied by cuts."""
        return [*self.pairs, *self.within, *self.cut_ties(loose)]

    def cut_ties(self, loose: Mask) -> list[tuple[Ids, Ids]]:
        """Return the pairs of labels at the same place of equal parts, without those in `loose`."""
        tied = [rows[:, ~loose[rows[0]]] for rows in self.stretches]
        return [(rows[0], row) for rows in tied for row in rows[1:]]

    def tie_blocks(self, vector: Tensor, blocks: int) -> None:
        """Tie channels at the same place in each of `blocks` equal stretches of `vector` (1-D): they go together."""
        rows = vector.reshape(blocks, -1)
        for row in rows[1:]:
            self.unify(rows[0], row)

    def tie_along(self, labels: Tensor, dims: Collection[int], where: str, *, whole: bool = False) -> None:
        """Tie what lies at different places along `dims`, and at the same place along all others: it is one channel."""
        small = compact(labels)
        inner = sorted(d for d in dims if small.size(d) > 1)
        rows = small.movedim(inner, list(range(len(inner)))).reshape(math.prod(small.size(d) for d in inner), -1)
        self.unify(rows[:1].expand(rows.shape), rows, where, whole=whole)


def _an_outer_one_follows(classes: Ids) -> bool:
    """Return whether a dimension before the last has a single class at each of its indices."""
    for axis in range(classes.ndim - 1):
        rows = np.moveaxis(classes, axis, 0).reshape(classes.shape[axis], -1)
        if (rows == rows[:, :1]).all():
            return True
    return False
