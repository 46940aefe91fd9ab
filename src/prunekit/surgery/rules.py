"""Table: what each ATen op does to channel labels.

A rule reads the labels of the op's operands and sets those of its results. Ops that are tagged point-wise by PyTorch
share one rule; an op that stands in no table freezes the channels that reach it: unknown means unpruned, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prunekit.surgery import labels as lb
from prunekit.surgery.record import Recorder, Rule
from prunekit.surgery.recording import Call


def unknown(recorder: Recorder, call: Call) -> None:
    """Freeze whatever reaches an op that nobody has taught the tracer."""
    for tensor in call.tensors:
        recorder.ledger.freeze(recorder.labels(tensor), f"the operation '{call.op}' in {call.where}")
    no_labels(recorder, call)


def no_labels(recorder: Recorder, call: Call) -> None:
    """The results carry no channels of ours."""
    for result in call.results:
        recorder.set(result, lb.none_like(result.shape))


def freeze(recorder: Recorder, call: Call, labels: Tensor, why: str) -> None:
    """Freeze channels; the reason names the module that runs the op."""
    recorder.ledger.freeze(labels, f"{why} in {call.where}")


def pointwise(recorder: Recorder, call: Call) -> None:
    """Each result element depends on the operand elements at its place: their channels are one."""
    operands = [recorder.labels(tensor) for tensor in call.tensors]
    merged = operands[0] if operands else None
    for other in operands[1:]:
        assert merged is not None
        merged = lb.merge(recorder.ledger, merged, other, call.where)
    for result in call.results:
        if merged is None:
            recorder.set(result, lb.none_like(result.shape))
        else:
            recorder.set(result, lb.widened(merged, result.shape))


def first_operand(recorder: Recorder, call: Call) -> None:
    """The results carry the labels of the first operand: dropout, `zeros_like` and their kind."""
    labels = recorder.labels(call.tensors[0])
    for result in call.results:
        recorder.set(result, lb.widened(labels, result.shape))


def gated_linear_unit(recorder: Recorder, call: Call) -> None:
    """`glu`: the first half of the channels times the sigmoid of the second."""
    x, dim = call.args[0], call.argument(1, "dim", -1) % call.args[0].dim()
    labels = recorder.labels(x)
    half = x.size(dim) // 2
    vector = lb.vector_along(labels, dim)
    if vector is None:
        return unknown(recorder, call)
    recorder.ledger.tie_blocks(vector, 2)
    return recorder.set(call.results[0], lb.along(vector[:half], dim, call.results[0].shape))


def spatial(recorder: Recorder, call: Call) -> None:
    """Pooling and resampling: `(N, C, positions)` to `(N, C, other positions)`."""
    labels = recorder.labels(call.args[0])
    vector = lb.vector_along(labels, 1)
    if vector is None:
        return unknown(recorder, call)
    for result in call.results:
        recorder.set(result, lb.along(vector, 1, result.shape))
    return None


def reduction(recorder: Recorder, call: Call) -> None:
    """`mean`, `sum`, `amax` over some dimensions, which must not tell channels apart."""
    x = call.args[0]
    labels, result = recorder.labels(x), call.results[0]
    dims = call.argument(1, "dim")
    reduced = _dims(dims, x.dim())
    if reduced & lb.varying(labels):
        freeze(recorder, call, labels, f"'{call.op}' across channels")
        return no_labels(recorder, call)
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
    """A softmax or a running sum makes what lies along its dimension depend on each other: no channels, then."""
    labels = recorder.labels(call.args[0])
    if _dims(call.args[1], labels.dim()) & lb.varying(labels):
        freeze(recorder, call, labels, f"'{call.op}' across channels")
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
            *("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
            *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
            *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d"),
            *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d"),
            *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
        ),
        spatial,
    ),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "logsumexp"), reduction),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod"), along_dimension),
    **dict.fromkeys(("empty", "arange", "zeros", "ones", "full", "scalar_tensor", "rand", "randn"), no_labels),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full"), no_labels),
}
