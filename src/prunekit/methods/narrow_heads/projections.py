"""The projections of attention, head by head: rows that make queries, keys or values, columns that read values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.surgery import Graph
from prunekit.surgery.copying import named_tensors
from prunekit.surgery.graph.labels import Ids
from prunekit.surgery.ops import HAND_ON


@dataclass(frozen=True)
class Projection:
    """One side of a head: `rows` `(width, inputs)` of a weight, and what a layer norm in front makes of them.

    `scaled` are the rows as they apply to what the norm gives before its own scale and shift, of unit variance, and
    `constant`, `(width,)`, is what they give besides.
    """

    places: tuple[tuple[str, int, Ids], ...]  # the weight and the bias: parameter, dimension, indices
    rows: Tensor
    scaled: Tensor
    constant: Tensor
    of: Projections
    bias_of_reader: str | None = None

    def gram(self, *, common: bool) -> Tensor:
        """Return the Gram matrix of the rows; with `common` that of rows and constants."""
        own = self.scaled @ self.scaled.t()
        return own + self.constant.outer(self.constant) if common else own

    def write(self, new: dict[str, Tensor], turn: Tensor) -> None:
        """Write the turned coordinates into full-size tensors."""
        for name, dim, index in self.places:
            full, places = self.of.full(new, name), torch.from_numpy(index)
            moved = full.movedim(dim, 0)  # a view
            moved[places] = torch.tensordot(turn, self.of.double(name).movedim(dim, 0)[places], 1)


class Projections:
    """The projections of a network, in double precision, on the processor."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.given = named_tensors(model)
        self._graph = graph
        inside = graph.inside
        self._slots = {
            key: classes
            for key, classes in graph.slots.items()
            if inside is not None and (inside.number_of[classes] >= 0).any()
        }

    def double(self, name: str) -> Tensor:
        """Return a parameter as it was given."""
        return self.given[name].detach().double().cpu()

    def full(self, new: dict[str, Tensor], name: str) -> Tensor:
        """Return a parameter's new values among `new`, where it begins as a copy of the old ones."""
        return new.setdefault(name, self.double(name).clone())

    def making(self, row: Ids) -> Projection:
        """Return what makes the coordinates of some classes."""
        weight, dim, index = next(self._found(row, reads=False, matrix=True))
        bias = next(self._found(row, reads=False, matrix=False), None)
        rows = self.double(weight).movedim(dim, 0)[torch.from_numpy(index)].flatten(1)
        constant = rows.new_zeros(row.size) if bias is None else self.double(bias[0])[torch.from_numpy(bias[2])]
        scale, shift = self._norm_in_front(weight, rows.size(1))
        places = ((weight, dim, index), *((bias,) if bias else ()))
        return Projection(places, rows, rows * scale, constant + rows @ shift, self)

    def reading(self, row: Ids) -> list[Projection]:
        """Return what reads the coordinates of some classes, once for each head that has them."""
        found = []
        for weight, dim, index in self._found(row, reads=True, matrix=True):
            rows = self.double(weight).movedim(dim, 0)[torch.from_numpy(index)].flatten(1)
            bias = next((node.read.bias for node in self._graph.reads(weight) if node.read), None)
            found.append(Projection(((weight, dim, index),), rows, rows, rows.new_zeros(row.size), self, bias))
        return found

    def _found(self, row: Ids, *, reads: bool, matrix: bool) -> Iterator[tuple[str, int, Ids]]:
        """Yield the places of some classes in the order of these, in a matrix or a vector that makes or reads them."""
        for (name, dim), classes in self._slots.items():
            if (self._graph.roles[name, dim] == "in") != reads or (len(self._graph.shapes[name]) > 1) != matrix:
                continue
            places = [np.flatnonzero(classes == one) for one in row]
            if all(found.size for found in places):
                for copy in range(places[0].size):
                    yield name, dim, np.array([found[copy] for found in places])

    def _norm_in_front(self, weight: str, inputs: int) -> tuple[Tensor, Tensor]:
        """Return scale and shift of the layer norm whose output is read, ones and zeros where it is none."""
        graph, none = self._graph, (torch.ones(inputs).double(), torch.zeros(inputs).double())
        value = graph.reads(weight)[0].inputs[0]
        while (maker := graph.maker(value)) is not None and maker.op in HAND_ON and maker.inputs:
            value = maker.inputs[0]
        if maker is None or maker.op != "native_layer_norm":
            return none
        found = [self.double(name) for name in maker.parameters]
        if not found or any(tensor.shape != (inputs,) for tensor in found):
            return none
        return found[0], found[1] if len(found) > 1 else none[1]
