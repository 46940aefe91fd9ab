"""Test whether heads of attention may be narrower: the network runs at other widths of them, and is compared.

What numbers of modules count the width (`head_dim`) is found as for channels. A factor of the scores that the code
computes from the width changes with it; by what power, shows in the factors of the run.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from prunekit.surgery.editing.attributes import own_factors
from prunekit.surgery.execution.sources import Source
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.groups import Classes
from prunekit.surgery.graph.inside import Candidate, candidates, joined, obstacle
from prunekit.surgery.graph.labels import channels_in
from prunekit.surgery.graph.recording import Node, Recording
from prunekit.surgery.tracing.probe import Keeps, Like, Misfit, Prober

_log = logging.getLogger(__name__)

Build = Callable[[Sequence[Candidate]], tuple[Classes, Graph]]
_MIXED = "its coordinates are read together"


def look_inside(
    recording: Recording, classes: Classes, graph: Graph, source: Source, build: Build
) -> tuple[list[Candidate], dict[str, str]]:
    """Return the coordinates inside heads that may go, and for the other groups of heads why theirs may not."""
    if graph.balancer is not None:
        return [], {}
    owners = {name: _MIXED for name in graph.heads if graph.group(name).free}
    able: list[Candidate] = []
    for one in candidates(recording, classes):
        why = obstacle(recording, one)
        if why is None:
            able.append(one)
        else:
            owners[_owner(one, classes, graph)] = why
    found: list[Candidate] = []
    for several in (able, joined(able, classes)):  # what works by itself, then what does together
        open_ = [one for one in several if not _overlaps(one, found) and _half(one) < one.width]
        left, why = _working(recording, source, build, found, open_)
        # of values alone there is nothing to tell: what holds their queries does
        owners |= {_owner(one, classes, graph): why for one in open_ if one not in left and one.kind != "v"}
        found += left
    done = {_owner(one, classes, graph) for one in found}
    return found, {name: why for name, why in owners.items() if name not in done}


def _owner(one: Candidate, classes: Classes, graph: Graph) -> str:
    head = next(iter(one.sides.values()))[0][0, 0]
    owner: str = graph.groups[graph.group_of[classes.of_label[head]]].name
    return owner


def _overlaps(one: Candidate, others: Sequence[Candidate]) -> bool:
    mine = {int(sides[0][0, 0]) for sides in one.sides.values()}
    return any(int(sides[0][0, 0]) in mine for other in others for sides in other.sides.values())


def _working(
    recording: Recording, source: Source, build: Build, found: Sequence[Candidate], several: Sequence[Candidate]
) -> tuple[list[Candidate], str]:
    """Return those candidates at whose other widths the network runs, beside some that are known to."""
    left, reason, numbers = list(several), "", copy.deepcopy(recording.numbers)
    modules = dict(source.subject().named_modules())  # with stand-ins, which have a number for the width
    while left:
        scales: dict[int, float] = {}
        recording.numbers = {module: dict(own) for module, own in numbers.items()}
        classes, graph = build([*found, *left])
        rows = [torch.from_numpy(next(iter(one.sides.values()))[0][0]) for one in left]
        prober, keeps = Prober(recording, classes, graph, source, scales, rows), _thinned(graph, len(found), left)
        misfit = prober.misfit(keeps)
        while misfit is not None:
            like = Like(recording.passes[misfit.place[0]].nodes, modules, misfit.node)
            if not prober.count(modules, like, keeps, misfit):
                break
            misfit = prober.misfit(keeps)
        if misfit is None:
            _take_powers(recording, left, scales, modules)
            return left, reason
        reason = misfit.reason(misfit.node)
        _log.debug("inside heads: %s", reason)
        stuck = _at(recording, like.everywhere(misfit.node), misfit, left)
        left = [one for i, one in enumerate(left) if i not in stuck] if stuck else []
    recording.numbers = numbers
    return [], reason


def _thinned(graph: Graph, known: int, several: Sequence[Candidate]) -> Keeps:
    """Return about half of each width that is not known yet."""
    assert graph.inside is not None
    names = (width.name for width in graph.inside.widths[known:])
    return {name: range(_half(one)) for name, one in zip(names, several, strict=True)}


def _half(one: Candidate) -> int:
    """Return about half of a width: of values another one than of queries, for code may take the two to be equal."""
    return one.width // 2 + (one.kind == "v")


def _at(recording: Recording, nodes: Sequence[Node], misfit: Misfit, several: Sequence[Candidate]) -> set[int]:
    """Return the candidates whose labels arrive at some nodes or leave them."""
    flow = recording.passes[misfit.place[0]].flow
    met = [channels_in(t) for n in nodes for t in (*flow[n.index].inputs, *flow[n.index].outputs) if t is not None]
    there = np.concatenate([*met, np.zeros(1, dtype=np.int64)])
    return {
        i
        for i, one in enumerate(several)
        if any(np.isin(side, there).any() for own in one.sides.values() for side in own)
    }


def _take_powers(
    recording: Recording,
    several: Sequence[Candidate],
    scales: Mapping[int, float],
    modules: Mapping[str, nn.Module],
) -> None:
    """Note with which power of the width each candidate's scores are multiplied, and where that number is kept."""
    flow = recording.passes[0].flow
    for one in several:
        if not one.scores:
            continue
        parts = [side.ravel() for name in ("queries", "keys") for side in one.sides[name]]
        mine = np.concatenate([*parts, *one.scores])
        sides = [node for node in scales if any(np.isin(channels_in(t), mine).any() for t in flow[node].inputs)]
        change = sum(scales[node] for node in sides) / len(one.scores)
        one.power = round(change / math.log(_half(one) / one.width), 6)
        where = {recording.passes[0].nodes[node].module for node in sides}
        number = one.width**one.power
        one.scales = [
            (module, name)
            for module in sorted(where & modules.keys())
            for name, value in own_factors(modules[module]).items()
            if math.isclose(value, number, rel_tol=1e-9)
        ]
