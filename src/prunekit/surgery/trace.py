"""Read a network: run its forward once under the recorder, settle the facts, build the graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.errors import InputError
from prunekit.surgery import layer_rules, rules, view_rules
from prunekit.surgery.balance import Balancer, Shares, Traced, balances_of, compounding, traced
from prunekit.surgery.copying import copied, named_tensors, without_collection
from prunekit.surgery.graph import Graph, LinkedNorm, SelectedChannels
from prunekit.surgery.groups import Classes, build_groups, classify
from prunekit.surgery.labels import Mask, compact, ids
from prunekit.surgery.meta import like_input, unfused_attention
from prunekit.surgery.narrow import narrowed
from prunekit.surgery.probe import find_fixed, freeze_inputs
from prunekit.surgery.record import Recorder, track_modules
from prunekit.surgery.recording import Recording

_RULES = {**rules.TABLE, **view_rules.TABLE, **layer_rules.TABLE}
_log = logging.getLogger(__name__)


def as_inputs(x: Any) -> tuple[Any, ...]:
    """An example input as the tuple of positional arguments of `forward`."""
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def example_of(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """An example input of `shape`, batch included, in the floating-point type of the model's parameters; no values."""
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.empty(shape, device="meta", dtype=next(kinds, torch.float32))


def trace(model: nn.Module, x: Any, *, probe: bool = True) -> Graph:
    """Record `model` on the example input `x` (a tensor, or a tuple of them); the model is left as it is.

    Runs on the meta device: no weights are read, no activations stored. A forward that needs values runs on a real
    copy instead. Layers that only run in training (auxiliary heads) are recorded in a second, training-mode pass.
    Without `probe`, channels whose sizes are written into the code are not looked for: only verification finds them.

    Raises:
        InputError: the forward fails on this input.
    """
    inputs = as_inputs(x)
    # inference mode hides the ops that composite ones are made of
    with unfused_attention(), without_collection(), torch.inference_mode(False), torch.no_grad():
        recording, subject, example = _record(model, inputs)
        while True:
            classes, graph = _settled(recording, subject, example)
            fixed = find_fixed(recording, classes, graph, subject, example) if probe else []
            if not fixed or not freeze_inputs(recording, classes, fixed):
                return graph


def _settled(recording: Recording, subject: nn.Module, example: tuple[Any, ...]) -> tuple[Classes, Graph]:
    """Classes and graph; balanced instead of tied where ties by place are too strict, and balance can be had."""
    loose = compounding(recording)
    if loose.any():
        classes = classify(recording, loose)
        graph = _build(recording, classes, example)
        balancer = _balancer(recording, classes, loose, graph, subject)
        if balancer.quotas(tuple(-(-share // 2) for share in balancer.full)):
            return classes, replace(graph, balancer=balancer)
    classes = classify(recording)
    return classes, _build(recording, classes, example)


def _balancer(recording: Recording, classes: Classes, loose: Mask, graph: Graph, subject: nn.Module) -> Balancer:
    sizes = [group.size for group in graph.groups]
    balances = balances_of(recording, loose, classes.of_label, graph.group_of, sizes)

    def narrow(shares: Shares) -> Traced | None:
        try:
            with unfused_attention(), torch.no_grad():
                found, _, _ = _record(narrowed(subject, graph, balances, shares), graph.example)
        except (InputError, RuntimeError) as error:
            _log.debug("the network does not run at shares %s (%s)", shares, error)
            return None
        if len(found.nodes) != len(recording.nodes):
            return None
        own = classify(found, np.ones(found.ledger.count, dtype=np.bool_))
        return traced(found, own.of_label, own.count)

    return Balancer(balances, traced(recording, classes.of_label, classes.count), graph.group_of, narrow)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the network on the meta device: the same modules and shapes, no memory."""
    replaced: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        bare = like_input(tensor)
        if isinstance(tensor, nn.Parameter):
            bare = nn.Parameter(bare, requires_grad=tensor.requires_grad)
        replaced[id(tensor)] = bare
    return copied(model, replaced)


def to_meta(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs without their values."""
    moved: tuple[Any, ...] = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, inputs)
    return moved


def _record(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Recording, nn.Module, tuple[Any, ...]]:
    """The recording, the copy that was recorded, and the input it ran on."""
    bare, empty, values = skeleton(model).eval(), to_meta(inputs), dict(model.named_buffers())
    try:
        recording = _run(bare, empty, values)
    except Exception as error:  # whatever a stranger's forward raises without values, it may manage with them
        _log.debug("recording on the meta device failed (%s); recording real tensors", error)
        return _record_real(model, inputs, error)
    _record_training(bare, empty, values, recording)
    return recording, bare, empty


def _record_real(
    model: nn.Module, inputs: tuple[Any, ...], cause: Exception
) -> tuple[Recording, nn.Module, tuple[Any, ...]]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    real = tree_map(lambda t: _with_values(t).to(device) if isinstance(t, Tensor) else t, inputs)
    subject = copied(model).eval()
    try:
        return _run(subject, real, dict(subject.named_buffers())), subject, real
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(inputs) if isinstance(t, Tensor))
        raise InputError(
            f"the model's forward fails on an input of shape {shapes}: {_one_line(error)}",
            hint="pass an example input that the model takes (x=..., or --input-size C,H,W)",
        ) from cause


def _with_values(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _run(
    subject: nn.Module, inputs: tuple[Any, ...], values: Mapping[str, Tensor], recording: Recording | None = None
) -> Recording:
    """Record one forward; `values` are the real buffers of the network, which the subject may have on meta."""
    tensors = named_tensors(subject)
    recording = recording or Recording(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        frozenset(name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)),
    )
    modules = dict(subject.named_modules())
    recorder = Recorder(recording, tensors, _RULES, rules.unknown, modules, values)
    handles, first = track_modules(modules, recorder.stack), len(recording.nodes)
    try:
        with recorder:
            output = subject(*inputs)
        recorder.freeze_output(output)
        recorder.settle_links(first)
    finally:
        for handle in handles:
            handle.remove()
    return recording


def _record_training(
    bare: nn.Module, empty: tuple[Any, ...], values: Mapping[str, Tensor], recording: Recording
) -> None:
    """Auxiliary heads read pruned channels too, but only run in training mode: record them as well."""
    if recording.parameters <= recording.used:
        return
    two = tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t, empty)
    first_pass = len(recording.nodes)
    try:
        _run(bare.train(), two, values, recording)
    except Exception as error:  # some networks cannot be trained on such an input; what ran so far still counts
        _log.debug("the training-mode pass stopped: %s", error)
    finally:
        bare.eval()
        del recording.nodes[first_pass:], recording.flow[first_pass:]


def _build(recording: Recording, classes: Classes, example: tuple[Any, ...]) -> Graph:
    groups, group_of, unit_of = build_groups(recording, classes)
    first = next((t for t in tree_leaves(example) if isinstance(t, Tensor) and t.dim()), None)
    return Graph(
        groups=groups,
        nodes=tuple(recording.nodes),
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
        normalised={node: classes.of_label[ids(labels)] for node, labels in recording.normalised.items()},
        widths={module: classes.of_label[ids(labels)] for module, labels in recording.widths.items()},
        draws=tuple(
            classes.of_label[compact(labels).numpy()]
            for node, labels in recording.draws.items()
            if node < len(recording.nodes)
        ),
        returned=frozenset(recording.returned),
        shapes=recording.shapes,
        parameters=recording.parameters,
        group_of=group_of,
        unit_of=unit_of,
        example=to_meta(example),
        batch=int(first.size(0)) if first is not None else 1,
    )
