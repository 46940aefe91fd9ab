"""A table of layer times, measured over a few widths and read between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunekit.evaluation.timing import runners
from prunekit.evaluation.timing.conditions import Conditions
from prunekit.evaluation.timing.layers import LayerShape
from prunekit.progress import counter

Run = Callable[[], object]

_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
_ROUNDS, _WARM_UP, _PROBE_ROUNDS, _TINY_ROUNDS = 7, 1, 60, 200
# The block is read off this convolution; a block is one whose first channel costs `_SAME` of what all cost at least.
_PROBE = LayerShape(64, 64, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1))
_BLOCKS, _SAME = (32, 16, 8, 4), 0.97


@dataclass(frozen=True)
class Grid:
    """Times of one layer in milliseconds, `(inputs, outputs)`, at some widths in ascending order.

    Examples:
        >>> import numpy as np
        >>> from prunekit.evaluation.timing.table import Grid
        >>> grid = Grid((16, 32), (16, 32), np.array([[1.0, 2.0], [2.0, 4.0]]))
        >>> grid.at(32, 24), grid.at(8, 16)
        (3.0, 1.0)
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    times: NDArray[np.float64]

    def at(self, inputs: int, outputs: int) -> float:
        """Return the time with these widths; between those of the grid it is linear.

        Narrower layers than the narrowest that was measured take its time.
        """
        columns = [float(np.interp(inputs, self.inputs, column)) for column in self.times.T]
        return float(np.interp(outputs, self.outputs, columns))

    def rising(self) -> Grid:
        """Return it with no time above that of a wider layer, which is noise where it is measured."""
        falling = self.times[::-1, ::-1]
        least = np.minimum.accumulate(np.minimum.accumulate(falling, axis=0), axis=1)
        return Grid(self.inputs, self.outputs, least[::-1, ::-1])


@dataclass(frozen=True)
class LayerTimes:
    """The times of some layers under one set of conditions.

    Attributes:
        overhead: The milliseconds that a call of the runtime costs beside its work.
        block: The channels that its kernels work on at once: a part of a block takes as long as the whole.
        grids: The times of each layer.
    """

    overhead: float
    block: int
    grids: Mapping[LayerShape, Grid]

    def at(self, shape: LayerShape, inputs: int, outputs: int) -> float:
        """Return the milliseconds of a layer with these widths, each up to a full block.

        Inputs of less than one block cost what they are: a kernel adds them up one by one.
        """
        full = inputs if inputs <= self.block else filled(inputs, self.block)
        return self.grids[shape].at(full, filled(outputs, self.block))


def filled(width: int, block: int) -> int:
    """Return the width with its last block full."""
    return block * math.ceil(width / block)


def measured(shapes: Iterable[LayerShape], conditions: Conditions, known: LayerTimes | None = None) -> LayerTimes:
    """Return the times of `shapes`, measured where they are not `known`."""
    overhead, block = (known.overhead, known.block) if known else (_overhead(conditions), _block(conditions))
    grids = dict(known.grids) if known else {}
    missing, count = [shape for shape in dict.fromkeys(shapes) if shape not in grids], counter("timing layers")
    for done, shape in enumerate(missing):
        count(done, len(missing))
        grids[shape] = _grid(shape, conditions, overhead, block)
    return LayerTimes(overhead, block, grids)


def _overhead(conditions: Conditions) -> float:
    run = runners.nothing(conditions)
    with conditions.held():
        return 1e3 * min(conditions.seconds(run) for _ in range(_TINY_ROUNDS))


def _block(conditions: Conditions) -> int:
    """Return the largest block that a convolution shows: one channel of its last takes as long as all."""
    whole = _PROBE.outputs
    sizes = (whole, *(whole - block + 1 for block in _BLOCKS))
    taken = _in_turns(
        [runners.layer(_PROBE, _PROBE.inputs, size, conditions) for size in sizes], conditions, _PROBE_ROUNDS
    )
    return next((b for b, t in zip(_BLOCKS, taken[1:], strict=True) if t >= _SAME * taken[0]), 1)


def _grid(shape: LayerShape, conditions: Conditions, overhead: float, block: int) -> Grid:
    """Time a layer at all widths in turns, so that what disturbs disturbs all alike, and take the least of each."""
    outputs = widths(shape.outputs, block, shape.groups)
    inputs = (
        (shape.inputs,) if shape.is_depthwise else (*parts(shape, block), *widths(shape.inputs, block, shape.groups))
    )
    scale = shape.inputs / shape.outputs

    def run(into: int, out: int) -> Run:
        return runners.layer(shape, round(out * scale) if shape.is_depthwise else into, out, conditions)

    taken = _in_turns([run(into, out) for into in inputs for out in outputs], conditions)
    times = np.array(taken).reshape(len(inputs), len(outputs))
    beside = overhead if conditions.runtime == "onnx" else 0.0  # paid once a network there, once a layer in PyTorch
    return Grid(inputs, outputs, np.maximum(times - beside, 0.0)).rising()


def _in_turns(runs: Sequence[Run], conditions: Conditions, rounds: int = _ROUNDS) -> list[float]:
    """Return the least milliseconds of each call, over some rounds through all of them."""
    times = [math.inf] * len(runs)
    with conditions.held():
        for number in range(_WARM_UP + rounds):
            for place, run in enumerate(runs):
                taken = conditions.seconds(run)
                if number >= _WARM_UP:
                    times[place] = min(times[place], 1e3 * taken)
    return times


def widths(whole: int, block: int, groups: int = 1) -> tuple[int, ...]:
    """Return the widths at which a layer of `whole` channels is measured: shares of it in full blocks, and itself."""
    step = block if groups in (1, whole) else math.lcm(block, groups)
    shares = (step * max(1, round(whole * share / step)) for share in _SHARES)
    return tuple(sorted({width for width in shares if width < whole} | {whole}))


def parts(shape: LayerShape, block: int) -> tuple[int, ...]:
    """Return the inputs of less than one block at which a layer is measured as well."""
    least = min(block, shape.inputs)
    return tuple(sorted({least // 4, least // 2} - {0, least})) if shape.groups == 1 else ()
