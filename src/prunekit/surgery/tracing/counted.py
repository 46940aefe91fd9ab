"""Numbers that modules keep and their forwards read, such as the number of heads: which channels each of them counts.

Equal numbers prove nothing: a width of 8 may be equal to a number of heads. So a narrowed network is run with the
number set to what is left, and only if it gets past the place where it parted from the recording does the number count
these channels. Modules of the same class keep the same numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from prunekit.surgery.editing.attributes import own_numbers
from prunekit.surgery.graph.labels import Mask, _first_along_others, ids, varying
from prunekit.surgery.graph.recording import Flow, Node, Recording

_MOST_TRIALS = 64

Address = tuple[str, str, int | None]  # a module, the name of its attribute, and the place in one of several numbers


def lines_of(recording: Recording, node: Node, flow: Flow) -> list[Tensor]:
    """Return the labels along each dimension of an op's results along which there are channels, others at their first.

    Those of a view of a parameter are the parameter's.
    """
    if flow.outputs and flow.outputs[0] is None:
        return [slot.labels for (name, _), slot in recording.slots.items() if name in node.parameters]
    return [
        _first_along_others(labels, {dim}).reshape(-1)
        for labels in flow.outputs
        if labels is not None
        for dim in sorted(varying(labels))
    ]


def ways_to_count(
    modules: Mapping[str, nn.Module], where: str, lines: Sequence[Tensor], stays: Mask
) -> Iterator[Mapping[Address, int]]:
    """Yield ways in which numbers near the module `where` may count what is left of some lines: fewest first.

    A way gives the position of the line that each number counts.
    """
    changed = [i for i, line in enumerate(lines) if 0 < np.count_nonzero(stays[ids(line)]) < line.numel()]
    near = list(_near(modules, where))
    options = {
        i: [
            (name, *number)
            for name in near
            for number, value in plain_numbers(modules[name]).items()
            if value == lines[i].numel()
        ]
        for i in changed
    }
    ways = (
        dict(zip(addresses, several, strict=True))
        for count in range(1, len(changed) + 1)
        for several in itertools.combinations(changed, count)
        for addresses in itertools.product(*(options[i] for i in several))
        if len(set(addresses)) == count
    )
    yield from itertools.islice(ways, _MOST_TRIALS)


def _near(modules: Mapping[str, nn.Module], where: str) -> Iterator[str]:
    """Yield the module whose code runs an op, those that hold it, from the inside out, and those within it."""
    if where not in modules:  # the outermost goes by its class
        where = ""
    inside = where
    while inside:
        yield inside
        inside = inside.rpartition(".")[0]
    yield ""
    yield from (name for name in modules if name.startswith(f"{where}." if where else "") and name not in ("", where))


def plain_numbers(module: nn.Module) -> dict[tuple[str, int | None], int]:
    """Return a module's own numbers by attribute and place, which is None for one that stands alone."""
    found: dict[tuple[str, int | None], int] = {}
    for name, value in own_numbers(module).items():
        if isinstance(value, int):
            found[name, None] = value
        else:
            found.update({(name, place): one for place, one in enumerate(value)})
    return found
