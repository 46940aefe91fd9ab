"""Table: what the ops that own weights do to channel labels: they read channels, make new ones, or scale them."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.nn.channels import ChannelSelect
from prunekit.surgery.graph import joining
from prunekit.surgery.graph import labels as lb
from prunekit.surgery.graph.recording import Call, Link, ParameterView, Selection
from prunekit.surgery.ops import BATCH_NORMS
from prunekit.surgery.tracing.recorder import Recorder, Rule
from prunekit.surgery.tracing.rules.elementwise import unknown


def convolution(recorder: Recorder, call: Call) -> None:
    """Apply any convolution: 1-D to 3-D, grouped, depthwise, transposed."""
    x, weight = call.args[0], recorder.parameter(call.args[1])
    transposed, groups = bool(call.argument(6, "transposed")), int(call.argument(8, "groups"))
    vector = recorder.channels(x, 1, call.where)
    own = tuple(range(call.args[1].dim()))
    if weight is None or weight.dims != own or vector is None:
        return unknown(recorder, call)
    if transposed and groups > 1:
        produced = _grouped_transposed(recorder, weight, vector, call.args[1].size(1), groups)
    elif groups == 1:
        out, into = (1, 0) if transposed else (0, 1)
        produced = recorder.recording.produced(weight.name, out, call.args[1].size(out))
        recorder.recording.slot(weight.name, into, "in", vector)
    elif call.args[1].size(1) == 1:
        produced = _depthwise(recorder, weight, vector, call.args[1].size(0))
    else:
        produced = _grouped(recorder, weight, vector, call.args[1].size(0), groups)
    _bias(recorder, call.argument(2, "bias"), produced)
    return recorder.set(call.results[0], lb.along(produced, 1, call.results[0].shape))


def _depthwise(recorder: Recorder, weight: ParameterView, vector: Tensor, outputs: int) -> Tensor:
    """Return the output labels of a depthwise convolution: each input makes `multiplier` channels, which go with it."""
    multiplier = outputs // vector.numel()
    return recorder.recording.slot(weight.name, 0, "along", vector.repeat_interleave(multiplier))


def _grouped(recorder: Recorder, weight: ParameterView, vector: Tensor, outputs: int, groups: int) -> Tensor:
    """Return the output labels of a grouped convolution: equal places are tied, so all groups keep equally many."""
    recorder.ledger.tie_blocks(vector, groups)
    recorder.recording.slot(weight.name, 1, "in", vector[: vector.numel() // groups])
    produced = recorder.recording.produced(weight.name, 0, outputs)
    recorder.ledger.tie_blocks(produced, groups)
    return produced


def _grouped_transposed(recorder: Recorder, weight: ParameterView, vector: Tensor, outputs: int, groups: int) -> Tensor:
    """Return the output labels of a grouped transposed convolution.

    The weight is `(inputs, outputs of one group, ...)`: index `o` stands for output `o` of every group.
    """
    if vector.numel() == groups:
        recorder.recording.slot(weight.name, 0, "along", vector)
        return vector.repeat_interleave(outputs)
    recorder.ledger.tie_blocks(vector, groups)
    recorder.recording.slot(weight.name, 0, "in", vector)
    return recorder.recording.produced(weight.name, 1, outputs).repeat(groups)


def _bias(recorder: Recorder, bias: Tensor | None, produced: Tensor) -> None:
    if bias is None:
        return
    view = recorder.parameter(bias)
    computed = lb.none_like(bias.shape) if view is not None else recorder.labels(bias)
    if view is None and bias.shape == produced.shape and bool((computed != 0).all()):
        recorder.ledger.unify(produced, computed)
    elif view is None:
        recorder.ledger.freeze(recorder.labels(bias), "a computed bias")
        recorder.ledger.freeze(produced, "a computed bias")
    else:
        recorder.recording.slot(view.name, 0, "along", produced)


def linear(recorder: Recorder, call: Call) -> None:
    """Apply `addmm(bias, x, W^T)` and `mm(x, W^T)`: a linear layer over the last dimension."""
    *bias, x, matrix = [a for a in call.args if isinstance(a, Tensor)]
    weight = recorder.parameter(matrix)
    vector = recorder.channels(x, x.dim() - 1, call.where)
    if weight is None or recorder.parameter(x) is not None or vector is None or len(weight.dims) != 2:
        return unknown(recorder, call)
    into, out = weight.dims
    if into is None or out is None:
        return unknown(recorder, call)
    produced = recorder.recording.produced(weight.name, out, matrix.size(1))
    recorder.recording.slot(weight.name, into, "in", vector)
    _bias(recorder, bias[0] if bias else None, produced)
    return recorder.set(call.results[0], lb.along(produced, call.results[0].dim() - 1, call.results[0].shape))


def batch_norm(recorder: Recorder, call: Call) -> None:
    """Apply a batch norm: per-channel statistics and scales ride along with dimension 1."""
    x = call.args[0]
    vector = recorder.channels(x, 1, call.where)
    if vector is None:
        return unknown(recorder, call)
    if bool((vector != 0).any()):
        vector = _private(recorder, call, vector)
    recorder.set(call.results[0], _ride_along(recorder, call, vector, 1))
    recorder.note_width(call.where, vector)
    return _statistics(recorder, call)


def _private(recorder: Recorder, call: Call, stream: Tensor) -> Tensor:
    """Return labels of its own for what a batch norm passes on, linked to those of what it reads.

    Whether that is a stream with other readers is known only at the end; see `Recorder.settle_links`.
    """
    views = [recorder.parameter(tensor) for tensor in call.tensors[1:]]
    if not views or views[0] is None:
        return stream
    scale = views[0].name
    link = recorder.recording.links.get(scale)
    if link is None:
        slot = recorder.recording.slots.get((scale, 0))
        if slot is not None and slot.role == "along":  # settled by an earlier recording: no stream
            return stream
        link = Link(scale, stream, recorder.recording.produced(scale, 0, stream.numel()))
        recorder.recording.links[scale] = link
    recorder.ledger.unify(link.stream, stream, call.where)
    link.reads.append(recorder.value(call.args[0]))
    return link.private


def _ride_along(recorder: Recorder, call: Call, vector: Tensor, dim: int) -> Tensor:
    """Attach every 1-D parameter of the op to the channels; return the labels of the result."""
    for tensor in call.tensors[1:]:
        view = recorder.parameter(tensor)
        if view is not None:
            recorder.recording.slot(view.name, 0, "along", vector)
        elif bool((recorder.labels(tensor) != 0).all()):  # a parameter repeated for each image: instance norm
            recorder.ledger.unify(vector, recorder.labels(tensor), call.where)
        else:
            recorder.ledger.freeze(vector, f"a computed scale in {call.where}")
    return lb.along(vector, dim, call.args[0].shape)


def _statistics(recorder: Recorder, call: Call) -> None:
    for result in call.results[1:]:
        recorder.set(result, lb.none_like(result.shape))


def layer_norm(recorder: Recorder, call: Call) -> None:
    """Apply a layer norm, which normalises across channels: over the kept ones, once some are gone."""
    x, normalised = call.args[0], call.args[1]
    labels, last = recorder.labels(x), x.dim() - 1
    moving = lb.varying(labels)
    if not moving & set(range(x.dim() - len(normalised), x.dim())):
        recorder.set(call.results[0], labels)
        return _statistics(recorder, call)
    if moving - {last} and len(normalised) == 1:  # within each head, with one scale for all
        recorder.set(call.results[0], joining.collapsed(recorder.ledger, labels, {last}, call.where))
        return _statistics(recorder, call)
    vector = recorder.channels(x, last, call.where)
    if len(normalised) != 1 or vector is None:
        return unknown(recorder, call)
    recorder.set(call.results[0], _ride_along(recorder, call, vector, last))
    recorder.recording.normalised[len(recorder.recording.nodes)] = vector
    recorder.note_width(call.where, vector)
    return _statistics(recorder, call)


def group_norm(recorder: Recorder, call: Call) -> None:
    """Apply a group norm, which normalises within groups of channels: equal places in all groups are tied."""
    x, groups = call.args[0], int(call.argument(6, "group"))
    vector = recorder.channels(x, 1, call.where)
    if vector is None:
        return unknown(recorder, call)
    recorder.ledger.tie_blocks(vector, groups)
    recorder.set(call.results[0], _ride_along(recorder, call, vector, 1))
    recorder.recording.normalised[len(recorder.recording.nodes)] = vector
    recorder.note_width(call.where, vector)
    return _statistics(recorder, call)


def embedding(recorder: Recorder, call: Call) -> None:
    """Apply an embedding: rows looked up by number, whose entries are channels."""
    table = recorder.parameter(call.args[0])
    if table is None or table.dims != (0, 1):
        return unknown(recorder, call)
    produced = recorder.recording.produced(table.name, 1, call.args[0].size(1))
    result = call.results[0]
    return recorder.set(result, lb.along(produced, result.dim() - 1, result.shape))


def index(recorder: Recorder, call: Call) -> None:
    """Apply `x[i, j]` with tensors of positions: biases looked up in a table, with a column for each head, say."""
    x, places = call.args[0], call.args[1]
    looked_up = [dim for dim, place in enumerate(places) if place is not None]
    block = list(range(looked_up[0], looked_up[-1] + 1))
    if looked_up != block or any(places[dim].dtype == torch.bool for dim in block):
        return unknown(recorder, call)
    rest = [dim for dim in range(x.dim()) if dim not in block and x.size(dim) > 1]
    labels = recorder.labels(x, rest[-1]) if recorder.is_bare(x) and rest else recorder.labels(x)
    if lb.varying(labels) & set(block):
        return unknown(recorder, call)
    result = call.results[0]
    for dim in reversed(block):
        labels = labels.narrow(dim, 0, 1).squeeze(dim)
    for _ in range(result.dim() - labels.dim()):
        labels = labels.unsqueeze(block[0])
    return recorder.set(result, labels.expand(result.shape))


def index_select(recorder: Recorder, call: Call) -> None:
    """Apply a fixed selection: along positions it keeps labels; along channels it is left to `ChannelSelect`."""
    x, dim = call.args[0], call.args[1] % call.args[0].dim()
    labels, result = recorder.labels(x), call.results[0]
    if isinstance(recorder.modules.get(call.where), ChannelSelect):
        return _select_channels(recorder, call)
    if dim in lb.varying(labels):
        return unknown(recorder, call)
    small = labels.narrow(dim, 0, min(1, labels.size(dim)))
    return recorder.set(result, small.expand(result.shape))


def _select_channels(recorder: Recorder, call: Call) -> None:
    index = recorder.values.get(f"{call.where}.index")
    vector = recorder.channels(call.args[0], 1, call.where)
    if index is None or index.is_meta or vector is None:
        return unknown(recorder, call)
    index = index.cpu()
    recorder.recording.selections[call.where] = Selection(call.where, index, vector)
    return recorder.set(call.results[0], lb.along(vector[index], 1, call.results[0].shape))


TABLE: dict[str, Rule] = {
    "convolution": convolution,
    **dict.fromkeys(("addmm", "mm"), linear),
    **dict.fromkeys(BATCH_NORMS, batch_norm),
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
    "embedding": embedding,
    "index": index,
    "index_select": index_select,
}
