"""Table: what each ATen op does to channel labels.

A rule reads the labels of the op's operands and sets those of its results. Ops that are tagged point-wise by PyTorch
share one rule; an op that stands in no table freezes the channels that reach it: unknown means unpruned, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prunekit.surgery.graph import joining
from prunekit.surgery.graph import labels as lb
from prunekit.surgery.graph.recording import Call
from prunekit.surgery.ops import NEAREST_UPSAMPLES, POOLS
from prunekit.surgery.tracing.recorder import Recorder, Rule


def unknown(recorder: Recorder, call: Call) -> None:
    """Freeze whatever reaches an op that nobody has taught the tracer."""
    for tensor in call.tensors:
        recorder.ledger.freeze(recorder.labels(tensor), f"the operation '{call.op}' in {call.where}")
    no_labels(recorder, call)


def no_labels(recorder: Recorder, call: Call) -> None:
    """Note that the results carry no channels of ours."""
    for result in call.results:
        recorder.set(result, lb.none_like(result.shape))


def freeze(recorder: Recorder, call: Call, labels: Tensor, why: str) -> None:
    """Freeze channels; the reason names the module that runs the op."""
    recorder.ledger.freeze(labels, f"{why} in {call.where}")


def pointwise(recorder: Recorder, call: Call) -> None:
    """Tie the channels of the operands: each result element depends on the operand elements at its place."""
    operands = labels_together(recorder, call.tensors)
    merged = operands[0] if operands else None
    for other in operands[1:]:
        assert merged is not None
        merged = joining.merge(recorder.ledger, merged, other, call.where)
    for result in call.results:
        if merged is None:
            recorder.set(result, lb.none_like(result.shape))
        else:
            recorder.set(result, lb.widened(merged, result.shape))


def labels_together(recorder: Recorder, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the labels of operands that meet place by place, their last dimensions aligned.

    A parameter among them has its channels where the others have theirs, and none where these have positions; none
    either where it has one value for several of their channels: scales of one head that all heads share.
    """
    bare = [recorder.is_bare(tensor) for tensor in tensors]
    moving: set[int] = set()
    for tensor, is_bare in zip(tensors, bare, strict=True):
        if not is_bare:
            moving.update(d - tensor.dim() for d in lb.varying(recorder.labels(tensor)))
    return [
        _labels_beside(recorder, tensor, moving) if is_bare and moving else recorder.labels(tensor)
        for tensor, is_bare in zip(tensors, bare, strict=True)
    ]


def _labels_beside(recorder: Recorder, parameter: Tensor, moving: set[int]) -> Tensor:
    own = [d + parameter.dim() for d in sorted(moving) if -d <= parameter.dim() and parameter.size(d) > 1]
    if len(own) == len(moving) or own == [d + parameter.dim() for d in sorted(moving)][:1]:
        return recorder.labels(parameter, own[0])
    return lb.none_like(parameter.shape)


def first_operand(recorder: Recorder, call: Call) -> None:
    """Give the results the labels of the first operand: dropout, `zeros_like` and their kind."""
    labels = recorder.labels(call.tensors[0])
    for result in call.results:
        recorder.set(result, lb.widened(labels, result.shape))


def gated_linear_unit(recorder: Recorder, call: Call) -> None:
    """Apply `glu`: the first half of the channels times the sigmoid of the second."""
    x, dim = call.args[0], call.argument(1, "dim", -1) % call.args[0].dim()
    half = x.size(dim) // 2
    vector = recorder.channels(x, dim, call.where)
    if vector is None:
        return unknown(recorder, call)
    recorder.ledger.tie_blocks(vector, 2)
    return recorder.set(call.results[0], lb.along(vector[:half], dim, call.results[0].shape))


def spatial(recorder: Recorder, call: Call) -> None:
    """Apply pooling and resampling: `(N, C, positions)` to `(N, C, other positions)`."""
    vector = recorder.channels(call.args[0], 1, call.where)
    if vector is None:
        return unknown(recorder, call)
    for result in call.results:
        recorder.set(result, lb.along(vector, 1, result.shape))
    return None


def reduction(recorder: Recorder, call: Call) -> None:
    """Apply `mean`, `sum`, `amax` over some dimensions, which must not tell all channels apart.

    Where channels lie along others too (a view of groups of channels), what becomes one number goes together.
    """
    x = call.args[0]
    labels, result = recorder.labels(x), call.results[0]
    dims = call.argument(2, "dim") if call.op == "linalg_vector_norm" else call.argument(1, "dim")
    reduced = _dims(dims, x.dim())
    moving = lb.varying(labels)
    if moving and moving <= reduced:
        recorder.freeze_if_read(call.results[0], labels, f"'{call.op}' across channels in {call.where}")
        return no_labels(recorder, call)
    if reduced & moving:
        recorder.ledger.tie_along(labels, reduced & moving, call.where)
    keep = result.dim() == x.dim()
    small = labels
    for d in sorted(reduced, reverse=True):
        small = small.narrow(d, 0, 1) if keep else small.select(d, 0)
    for out in call.results:
        recorder.set(out, small.expand(out.shape))
    return None


def _dims(dims: Any, rank: int) -> set[int]:
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return set(range(rank))
    return {d % rank for d in (dims if isinstance(dims, Sequence) else [dims])} if rank else set()


def along_dimension(recorder: Recorder, call: Call) -> None:
    """Tie or freeze what lies along the dimension of a softmax or a running sum: its elements depend on each other."""
    labels = recorder.labels(call.args[0])
    moving = lb.varying(labels)
    mixed = _dims(call.args[1], labels.dim()) & moving
    if mixed == moving and mixed:
        freeze(recorder, call, labels, f"'{call.op}' across channels")
    elif mixed:
        recorder.ledger.tie_along(labels, mixed, call.where)
    recorder.set(call.results[0], labels)


TABLE: dict[str, Rule] = {
    "pointwise": pointwise,
    **dict.fromkeys(("hardswish", "mish", "_prelu_kernel", "threshold", "copy", "masked_fill"), pointwise),
    **dict.fromkeys(
        (
            *("native_dropout", "bernoulli", "fill", "zero", "_to_copy", "log_sigmoid_forward"),
            *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
        ),
        first_operand,
    ),
    "glu": gated_linear_unit,
    **dict.fromkeys(
        (
            *(*POOLS, *NEAREST_UPSAMPLES),
            *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d"),
            *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
        ),
        spatial,
    ),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "logsumexp", "linalg_vector_norm"),
        reduction,
    ),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod"), along_dimension),
    **dict.fromkeys(("empty", "arange", "zeros", "ones", "full", "scalar_tensor", "rand", "randn"), no_labels),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full"), no_labels),
}
