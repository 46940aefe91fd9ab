"""Table: what the ops that move elements around do to channel labels.

Most are simply executed on the labels. What a forward computes from sizes it has written into its code (a split, a
reshape) is taken to follow the input's width; `probe.py` finds out where it does not.
"""

from __future__ import annotations

from torch import Tensor

from prunekit.nn.channels import ChannelPad
from prunekit.surgery.graph import joining
from prunekit.surgery.graph import labels as lb
from prunekit.surgery.graph.recording import Call, Pad, ParameterView
from prunekit.surgery.ops import RESHAPES
from prunekit.surgery.tracing.recorder import Recorder, Rule
from prunekit.surgery.tracing.rules.elementwise import freeze, labels_together, unknown


def rearrange(recorder: Recorder, call: Call) -> None:
    """Run a view that only moves, adds or drops whole dimensions on the labels themselves."""
    tensor = call.tensors[0]
    view = recorder.parameter(tensor)
    if view is not None and _track_view(recorder, call, tensor, view):
        return
    labels = recorder.labels(tensor)
    for result in call.results:
        recorder.set(result, call.func(labels, *call.args[1:], **call.kwargs).expand(result.shape))


def _track_view(recorder: Recorder, call: Call, tensor: Tensor, view: ParameterView) -> bool:
    """Follow a parameter through a view of the same non-singleton dimensions, in any order, perhaps expanded."""
    # A stride of its own for each dimension tells afterwards which one went where.
    probe = tensor.new_empty(0, device="meta").as_strided(tensor.shape, tuple(1000 + d for d in range(tensor.dim())))
    try:
        moved = call.func(probe, *call.args[1:], **call.kwargs)
    except (RuntimeError, NotImplementedError):
        return False
    dims: list[int | None] = []
    for size, stride in zip(moved.shape, moved.stride(), strict=True):
        source = stride - 1000
        if 0 <= source < tensor.dim() and tensor.size(source) == size:
            dims.append(view.dims[source])
        elif size == 1 or stride == 0:
            dims.append(None)
        else:
            return False
    recorder.set_view(call.results[0], ParameterView(view.name, tuple(dims)))
    return True


def same(recorder: Recorder, call: Call) -> None:
    """Apply `detach`, `alias`, `contiguous`: the same tensor, parameter or activation."""
    tensor = call.tensors[0]
    view = recorder.parameter(tensor)
    if view is not None:
        recorder.set_view(call.results[0], view)
    else:
        recorder.set(call.results[0], recorder.labels(tensor))


def reshape(recorder: Recorder, call: Call) -> None:
    """Apply `view` and its kind: regroup dimensions."""
    tensor, result = call.tensors[0], call.results[0]
    view = recorder.parameter(tensor)
    sizes = [size for size in tensor.shape if size != 1]
    if view is not None and sizes == [size for size in result.shape if size != 1]:
        own = iter([dim for size, dim in zip(tensor.shape, view.dims, strict=True) if size != 1])
        recorder.set_view(
            result, ParameterView(view.name, tuple(next(own) if size != 1 else None for size in result.shape))
        )
        return
    recorder.set(result, joining.reshape(recorder.ledger, recorder.labels(tensor), result.shape, call.where))


def concatenate(recorder: Recorder, call: Call) -> None:
    """Apply `cat`: channels side by side."""
    parts = [tensor for tensor in call.args[0] if tensor.shape != (0,)]
    dim = call.argument(1, "dim", 0) % call.results[0].dim()
    labels = labels_together(recorder, parts)
    recorder.set(call.results[0], joining.cat(recorder.ledger, labels, dim, call.where))


def stack(recorder: Recorder, call: Call) -> None:
    """Apply `stack`: a `cat` along a new dimension."""
    dim = call.argument(1, "dim", 0) % call.results[0].dim()
    labels = [labels.unsqueeze(dim) for labels in labels_together(recorder, call.args[0])]
    recorder.set(call.results[0], joining.cat(recorder.ledger, labels, dim, call.where))


def split(recorder: Recorder, call: Call) -> None:
    """Apply `split` and `chunk`: equal stretches of channels are tied, place by place; unequal ones are not."""
    x, dim = call.args[0], call.argument(2, "dim", 0) % call.args[0].dim()
    starts, position = [], 0
    for result in call.results:
        starts.append((position, position + result.size(dim)))
        position += result.size(dim)
    for result, (start, end) in zip(call.results, starts, strict=True):
        recorder.set(result, _stretch(recorder, call, recorder.labels(x), dim, start, end).expand(result.shape))


def slice_(recorder: Recorder, call: Call) -> None:
    """Apply a slice: strided or not along positions, a whole stretch along channels."""
    x = call.args[0]
    dim = call.argument(1, "dim", 0) % x.dim()
    start, end = call.argument(2, "start"), call.argument(3, "end")
    first, last, step = slice(start, end, call.argument(4, "step", 1)).indices(x.size(dim))
    labels, result = recorder.labels(x), call.results[0]
    if dim not in lb.varying(labels):
        return recorder.set(result, labels.narrow(dim, 0, min(1, x.size(dim))).expand(result.shape))
    if step != 1:
        labels = _whole(recorder, call, labels, dim)
    if step != 1 and dim not in lb.varying(labels):
        return recorder.set(result, labels.narrow(dim, 0, 1).expand(result.shape))
    if step != 1:
        freeze(recorder, call, labels, "a strided slice of channels")
        return recorder.set(result, labels[(slice(None),) * dim + (slice(first, last, step),)])
    return recorder.set(result, _stretch(recorder, call, labels, dim, first, last))


def _stretch(recorder: Recorder, call: Call, labels: Tensor, dim: int, start: int, end: int) -> Tensor:
    """Return labels of `[start, end)` along `dim`. Right only if the code halves (thirds, ...) whatever it is given."""
    size, total = end - start, labels.size(dim)
    if dim in lb.varying(labels) and size != total:
        labels = _whole(recorder, call, labels, dim)
    part = labels.narrow(dim, start, max(size, 0))
    if dim not in lb.varying(labels) or size == total:
        return part
    vector = lb.vector_along(labels, dim)
    if vector is None or size <= 1 or total % size or start % size:
        freeze(recorder, call, labels, "a slice of channels with fixed bounds")
        return part
    recorder.ledger.cut(vector, total // size)
    return part


def _whole(recorder: Recorder, call: Call, labels: Tensor, dim: int) -> Tensor:
    """Return the labels with `dim` left whole if channels lie along others too: one of several heads, say."""
    return joining.collapsed(recorder.ledger, labels, {dim}, call.where) if lb.varying(labels) - {dim} else labels


def _one_of_several(recorder: Recorder, call: Call, labels: Tensor, dim: int) -> bool:
    """Return whether what lies along `dim` has channels along other dimensions: queries, keys and values, say.

    These are as wide as each other, and their heads go together.
    """
    if dim in lb.varying(labels):
        if not lb.varying(labels) - {dim}:
            return False
        recorder.ledger.tie_along(labels, {dim}, call.where, whole=True)
    return True


def select(recorder: Recorder, call: Call) -> None:
    """Select one index of a dimension: fine along positions, a fixed channel otherwise."""
    x = call.args[0]
    dim = call.argument(1, "dim", 0) % x.dim()
    labels = recorder.labels(x)
    if not _one_of_several(recorder, call, labels, dim):
        freeze(recorder, call, labels, "a channel picked by its number")
    position = call.argument(2, "index", 0) % x.size(dim)
    recorder.set(call.results[0], labels.select(dim, position))


def restride(recorder: Recorder, call: Call) -> None:
    """Keep the labels through `as_strided` to the geometry that the tensor has anyway; any other one is unknown."""
    x, result = call.args[0], call.results[0]
    if result is x or (result.shape == x.shape and result.stride() == x.stride()):
        return recorder.set(result, recorder.labels(x))
    return unknown(recorder, call)


def unbind(recorder: Recorder, call: Call) -> None:
    """Pass labels on to all indices of a dimension as separate tensors."""
    dim = call.argument(1, "dim", 0) % call.args[0].dim()
    labels = recorder.labels(call.args[0])
    if not _one_of_several(recorder, call, labels, dim):
        freeze(recorder, call, labels, "channels taken apart by number")
    for position, result in enumerate(call.results):
        recorder.set(result, labels.select(dim, position))


def reorder(recorder: Recorder, call: Call) -> None:
    """Apply `roll` and `flip`: labels stay along positions; along channels the order is fixed by the code."""
    labels = recorder.labels(call.args[0])
    dims = call.args[-1] if call.op == "flip" else call.argument(2, "dims", [])
    rank = labels.dim()
    if lb.varying(labels) & {d % rank for d in (dims or range(rank))}:
        freeze(recorder, call, labels, f"a {call.op} of channels")
    recorder.set(call.results[0], labels)


def repeat(recorder: Recorder, call: Call) -> None:
    """Apply `repeat`: copies side by side, of positions or of channels."""
    labels, result = recorder.labels(call.args[0]), call.results[0]
    lifted = labels.reshape((1,) * (result.dim() - labels.dim()) + tuple(labels.shape))
    moving = lb.varying(lifted)
    copies = [result.size(d) // lifted.size(d) if d in moving else 1 for d in range(lifted.dim())]
    recorder.set(result, lb.recompact(lb.compact(lifted).repeat(copies).expand(result.shape)))


def pad(recorder: Recorder, call: Call) -> None:
    """Apply padding: of positions it changes no labels; of channels it is the business of a `ChannelPad` module."""
    x, widths, result = call.args[0], call.args[1], call.results[0]
    labels, rank = recorder.labels(x), x.dim()
    padded = {rank - 1 - i // 2 for i, width in enumerate(widths) if width}
    if isinstance(recorder.modules.get(call.where), ChannelPad) and padded == {1}:
        return _pad_channels(recorder, call, labels, result)
    if padded & lb.varying(labels):
        return unknown(recorder, call)
    kept = tuple(slice(0, 1) if d in padded else slice(None) for d in range(rank))
    return recorder.set(result, labels[kept].expand(result.shape))


def _pad_channels(recorder: Recorder, call: Call, labels: Tensor, result: Tensor) -> None:
    vector = lb.vector_along(labels, 1)
    if vector is None:
        return unknown(recorder, call)
    module = recorder.modules[call.where]
    assert isinstance(module, ChannelPad)
    known = recorder.recording.pads.get(call.where)
    if known is None:
        known = Pad(call.where, recorder.ledger.fresh(module.before), recorder.ledger.fresh(module.after))
        recorder.recording.pads[call.where] = known
    whole = joining.cat(recorder.ledger, [known.before, vector, known.after], 0, call.where)
    return recorder.set(result, lb.along(whole, 1, result.shape))


def shuffle_channels(recorder: Recorder, call: Call) -> None:
    """Apply `channel_shuffle`: groups of channels, side by side until now, take turns."""
    vector, groups = recorder.channels(call.args[0], 1, call.where), int(call.argument(1, "groups"))
    if vector is None:
        return unknown(recorder, call)
    recorder.ledger.cut(vector, groups)
    mixed = vector.reshape(groups, -1).t().reshape(-1)
    return recorder.set(call.results[0], lb.along(mixed, 1, call.results[0].shape))


def blocks(recorder: Recorder, call: Call) -> None:
    """Spread a block of channels over places, as one channel (`pixel_shuffle`, `Fold`); the others undo that."""
    before, after = (call.args[0].dim() - _CHANNELS[call.op][0], call.results[0].dim() - _CHANNELS[call.op][1])
    vector, result = recorder.channels(call.args[0], before, call.where), call.results[0]
    if vector is None:
        return unknown(recorder, call)
    if result.size(after) < vector.numel():
        rows = vector.reshape(result.size(after), -1)
        recorder.ledger.tie_along(rows, {1}, call.where)
        vector = rows[:, 0]
    else:
        vector = vector.repeat_interleave(result.size(after) // vector.numel())
    return recorder.set(result, lb.along(vector, after, result.shape))


# How many dimensions from the end the channels stand, before the op and after.
_CHANNELS = {"pixel_shuffle": (3, 3), "pixel_unshuffle": (3, 3), "im2col": (3, 2), "col2im": (2, 3)}

TABLE: dict[str, Rule] = {
    **dict.fromkeys(("t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "movedim"), rearrange),
    **dict.fromkeys(("detach", "alias", "lift_fresh"), same),
    **dict.fromkeys(RESHAPES, reshape),
    "cat": concatenate,
    "stack": stack,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), split),
    "slice": slice_,
    "select": select,
    "unbind": unbind,
    "as_strided": restride,
    **dict.fromkeys(("roll", "flip"), reorder),
    "repeat": repeat,
    "constant_pad_nd": pad,
    "channel_shuffle": shuffle_channels,
    **dict.fromkeys(_CHANNELS, blocks),
}
