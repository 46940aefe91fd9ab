"""Layers as a clock sees them: what the trace has recorded of their shape, and their widths after pruning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prunekit.surgery import Graph
from prunekit.surgery.graph.recording import Node

Sizes = Mapping[tuple[str, int], int]


@dataclass(frozen=True)
class LayerShape:
    """A convolution or a linear layer, without its weights.

    `positions` are the output's sizes in space; of a linear layer its rows for one image. `inputs` and `outputs` are
    all its channels; a depthwise one has as many groups as it keeps inputs.
    """

    inputs: int
    outputs: int
    positions: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether it is a product of matrices."""
        return not self.kernel

    @property
    def is_depthwise(self) -> bool:
        """Whether each input has a group of its own."""
        return self.groups > 1 and self.groups == self.inputs

    def input_positions(self) -> tuple[int, ...]:
        """Return the smallest input sizes that give the output's."""
        found = []
        for size, k, s, p, d in zip(self.positions, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            reach = d * (k - 1) + 1
            found.append((size + 2 * p - reach) // s + 1 if self.transposed else (size - 1) * s + reach - 2 * p)
        return tuple(max(1, size) for size in found)

    def elements(self, outputs: int) -> int:
        """Return how many numbers it gives for one image."""
        return outputs * math.prod(self.positions)


@dataclass(frozen=True)
class Layer:
    """One call of a layer: its weight, the weight's dimensions of outputs and inputs, and its shape."""

    weight: str
    out: int
    into: int
    shape: LayerShape

    @property
    def name(self) -> str:
        """The module, or the weight of none."""
        return self.weight.rpartition(".")[0] or self.weight

    def widths(self, sizes: Sizes) -> tuple[int, int]:
        """Return the inputs and outputs that are left, given what is left of each dimension of the weights."""
        shape, per_group = self.shape, 1 if self.shape.is_depthwise else self.shape.groups
        outputs = sizes.get((self.weight, self.out), shape.outputs)
        if shape.is_depthwise:
            return max(1, outputs * shape.inputs // shape.outputs), outputs
        return per_group * sizes.get((self.weight, self.into), shape.inputs // per_group), outputs


def layers_of(graph: Graph) -> Iterator[Layer]:
    """Yield each call of a convolution or linear layer with a weight of its own, in execution order."""
    for node in graph.nodes:
        layer = _convolution(graph, node) if node.op == "convolution" else _linear(graph, node)
        if layer is not None:
            yield layer


def _convolution(graph: Graph, node: Node) -> Layer | None:
    read = node.read
    shape = () if read is None else graph.shapes[read.parameter]
    if read is None or len(shape) != 2 + len(read.stride) or (read.transposed and read.groups > 1):
        return None
    out, into = (1, 0) if read.transposed else (0, 1)
    if read.dim != into:
        return None
    return Layer(
        read.parameter,
        out,
        into,
        LayerShape(
            shape[into] * read.groups,
            shape[out],
            node.shape[2:],
            shape[2:],
            read.stride,
            read.padding,
            read.dilation,
            read.groups,
            read.transposed,
        ),
    )


def _linear(graph: Graph, node: Node) -> Layer | None:
    read = node.read
    if read is None or node.op not in ("addmm", "mm") or len(graph.shapes[read.parameter]) != 2:
        return None
    shape, out = graph.shapes[read.parameter], 1 - read.dim
    rows = max(1, math.prod(node.shape[:-1]) // graph.batch)
    return Layer(read.parameter, out, read.dim, LayerShape(shape[read.dim], shape[out], (rows,)))
