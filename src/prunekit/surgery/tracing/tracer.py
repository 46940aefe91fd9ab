"""Read a network: run its forward under the recorder, settle the facts, build the graph."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunekit.errors import InputError
from prunekit.progress import counter
from prunekit.surgery.copying import without_collection
from prunekit.surgery.execution.sources import Source, bound_inputs, to_meta, transparent
from prunekit.surgery.graph.balance import Balancer, Shares, Traced, balances_of, compounding, traced
from prunekit.surgery.graph.graph import FurtherPass, Graph, LinkedNorm, SelectedChannels
from prunekit.surgery.graph.groups import ChannelGroup, Classes, build_groups, classify
from prunekit.surgery.graph.inside import Candidate, Finer, finer, group_of_width, inside_of
from prunekit.surgery.graph.labels import Ids, Mask, compact, ids
from prunekit.surgery.graph.recording import Pass, Recording
from prunekit.surgery.tracing.inside import look_inside
from prunekit.surgery.tracing.narrow import narrowed
from prunekit.surgery.tracing.probe import freeze_fixed
from prunekit.surgery.tracing.runs import record

_log = logging.getLogger(__name__)


def example_of(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Return an example input of `shape`, batch included, in the model's floating-point type; it has no values."""
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.empty(shape, device="meta", dtype=next(kinds, torch.float32))


def trace(
    model: nn.Module,
    x: Any,
    *,
    examples: Iterable[Any] = (),
    probe: bool = True,
    values: bool = False,
    inside_heads: bool = False,
) -> Graph:
    """Record `model` on the example input `x` (see `bound_inputs`) and on further `examples`; the model stays as it is.

    Runs on the meta device: no weights are read, no activations stored. A forward that needs values runs on a real
    copy instead. Layers that only run in training (auxiliary heads) are recorded in a second, training-mode pass;
    those that another path reaches take a further example. Costs are those of `x`.
    Without `probe`, channels whose sizes are written into the code are not looked for: only verification finds them.
    With `values` a real copy is run in any case: only there are tensors that the code makes of a width found out.
    With `inside_heads` the widths of heads of attention are groups too, such as `blocks.0.attention.qkv[qk]`.

    Raises:
        InputError: the forward fails on one of these inputs.
    """
    inputs, further = bound_inputs(model, x), [bound_inputs(model, other) for other in examples]
    _log.debug("tracing %s", type(model).__name__)
    counter("tracing")(0, 0)
    with transparent(), without_collection():
        recording, source = record(Source(model, values), inputs, further)
        while True:
            classes, graph = _settled(recording, source)
            if not probe or not freeze_fixed(recording, classes, graph, source):
                break
        return _with_widths(recording, classes, graph, source) if inside_heads else graph


def _with_widths(recording: Recording, classes: Classes, graph: Graph, source: Source) -> Graph:
    """Return the graph with the widths of heads, where the code works at others."""

    def build(several: Sequence[Candidate]) -> tuple[Classes, Graph]:
        fine = finer(recording, classes, several)
        return fine.classes, _finely(recording, classes, several, fine)

    found, rigid = look_inside(recording, classes, graph, source, build)
    return replace(build(found)[1] if found else graph, rigid=rigid)


def _settled(recording: Recording, source: Source) -> tuple[Classes, Graph]:
    """Return classes and graph; balanced instead of tied where ties by place are too strict, and balance can be had."""
    loose = compounding(recording)
    if loose.any():
        classes = classify(recording, loose)
        graph = _build(recording, classes)
        balancer = _balancer(recording, classes, loose, graph, source)
        if balancer.quotas(tuple(-(-share // 2) for share in balancer.full)):
            return classes, replace(graph, balancer=balancer)
    classes = classify(recording)
    return classes, _build(recording, classes)


def _balancer(recording: Recording, classes: Classes, loose: Mask, graph: Graph, source: Source) -> Balancer:
    sizes = [group.size for group in graph.groups]
    balances = balances_of(recording, loose, classes.of_label, graph.group_of, sizes)
    first, further = recording.passes[0], [run.inputs for run in recording.passes[1:] if not run.training]

    def narrow(shares: Shares) -> Traced | None:
        try:
            with transparent():
                small = narrowed(source.subject(), graph, balances, shares)
                found, _ = record(Source(small, source.real), first.inputs, further)
        except (InputError, RuntimeError) as error:
            _log.debug("the network does not run at shares %s (%s)", shares, error)
            return None
        if len(found.passes[0].nodes) != len(first.nodes):
            return None
        own = classify(found, np.ones(found.ledger.count, dtype=np.bool_))
        return traced(found, own.of_label, own.count)

    return Balancer(balances, traced(recording, classes.of_label, classes.count), graph.group_of, narrow)


def _finely(recording: Recording, classes: Classes, several: Sequence[Candidate], fine: Finer) -> Graph:
    """Return the graph of a network whose heads are taken apart."""
    groups, group_of, unit_of = build_groups(recording, classes)
    graph = _graph(recording, fine.classes, groups, group_of[fine.coarse], unit_of[fine.coarse])
    owners = {int(c): groups[group_of[c]].name for c in fine.of_unit}
    inside = inside_of(several, fine, owners)
    widths = [group_of_width(inside, i, graph.slots, graph.roles) for i in range(len(several))]
    numbers = {
        module: {name: fine.counted(ids(labels)) for name, labels in own.items()}
        for module, own in recording.numbers.items()
    }
    return replace(graph, groups=(*groups, *widths), inside=inside, numbers=numbers)


def _build(recording: Recording, classes: Classes) -> Graph:
    return _graph(recording, classes, *build_groups(recording, classes))


def _graph(
    recording: Recording, classes: Classes, groups: tuple[ChannelGroup, ...], group_of: Ids, unit_of: Ids
) -> Graph:
    first = recording.passes[0]
    sized = next((t for t in tree_leaves(first.inputs) if isinstance(t, Tensor) and t.dim()), None)
    return Graph(
        groups=groups,
        nodes=tuple(first.nodes),
        slots={key: classes.of_label[ids(slot.labels)] for key, slot in recording.slots.items()},
        roles={key: slot.role for key, slot in recording.slots.items()},
        pads={
            name: (classes.of_label[ids(pad.before)], classes.of_label[ids(pad.after)])
            for name, pad in recording.pads.items()
        },
        links=tuple(
            LinkedNorm(link.norm, classes.of_label[ids(link.stream)], classes.of_label[ids(link.private)])
            for link in recording.links.values()
        ),
        selections={
            name: SelectedChannels(ids(selection.index), classes.of_label[ids(selection.inputs)])
            for name, selection in recording.selections.items()
        },
        normalised=_normalised(first, classes),
        widths={module: classes.of_label[ids(labels)] for module, labels in recording.widths.items()},
        heads=_heads(recording, classes, groups, group_of),
        products={node: classes.of_label[ids(labels)] for node, labels in first.products.items()},
        numbers={
            module: {name: classes.of_label[ids(labels)] for name, labels in numbers.items()}
            for module, numbers in recording.numbers.items()
        },
        draws=_draws(first, classes),
        returned=frozenset(first.returned),
        shapes=recording.shapes,
        parameters=recording.parameters,
        group_of=group_of,
        unit_of=unit_of,
        example=to_meta(first.inputs),
        batch=int(sized.size(0)) if sized is not None else 1,
        further=tuple(_further(run, classes) for run in recording.passes[1:] if run.complete),
        never_ran=_never_ran(recording),
        plain=frozenset(name for name, plain in recording.plain.items() if plain),
    )


def _further(run: Pass, classes: Classes) -> FurtherPass:
    return FurtherPass(
        example=run.inputs,
        nodes=tuple(run.nodes),
        normalised=_normalised(run, classes),
        draws=_draws(run, classes),
        returned=frozenset(run.returned),
        training=run.training,
        real=run.real,
    )


def _normalised(run: Pass, classes: Classes) -> dict[int, Ids]:
    return {node: classes.of_label[ids(labels)] for node, labels in run.normalised.items()}


def _heads(recording: Recording, classes: Classes, groups: Sequence[ChannelGroup], group_of: Ids) -> frozenset[str]:
    found = [classes.of_label[labels] for labels in recording.heads]
    numbers = np.unique(group_of[np.concatenate(found)]) if found else np.empty(0, dtype=np.int64)
    return frozenset(groups[number].name for number in numbers if number >= 0)


def _draws(run: Pass, classes: Classes) -> tuple[Ids, ...]:
    return tuple(classes.of_label[compact(labels).numpy()] for labels in run.draws.values())


def _never_ran(recording: Recording) -> tuple[str, ...]:
    """Return what no pass has reached: the outermost modules none of whose parameters were used, or single parameters.

    A vector beside parameters that were used (the bias of a layer whose weight alone is read) reads no channels.
    """
    reached = {prefix for name in recording.used for prefix in _prefixes(name)}
    unused = [
        name
        for name, shape in recording.shapes.items()
        if name in recording.parameters - recording.used and (len(shape) > 1 or name.rpartition(".")[0] not in reached)
    ]
    return tuple(dict.fromkeys(next(p for p in _prefixes(name) if p not in reached) for name in unused))


def _prefixes(name: str) -> list[str]:
    """Return `a.b.weight` -> `[a, a.b, a.b.weight]`."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
