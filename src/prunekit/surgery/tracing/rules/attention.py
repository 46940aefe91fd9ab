"""Table: what products of two activations do to channel labels: attention, in whatever way it is written.

Products run along a batch dimension. Where channels lie along it, they are the heads of attention: what a head computes
is of one piece, so that all it reads goes with it, and what else there is along its rows stays as it is. That heads go
whole is noted apart from other ties: `inside.py` looks into them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prunekit.surgery.graph import joining
from prunekit.surgery.graph import labels as lb
from prunekit.surgery.graph.recording import Call, HeadProduct
from prunekit.surgery.tracing.recorder import Recorder, Rule
from prunekit.surgery.tracing.rules.elementwise import freeze, no_labels, unknown


def product(recorder: Recorder, call: Call) -> None:
    """Apply `bmm`: `(P, n, k)` times `(P, k, m)`, for each of `P` images and heads."""
    if any(recorder.is_bare(tensor) for tensor in call.tensors):
        return unknown(recorder, call)
    left, right = (recorder.labels(tensor) for tensor in call.args)
    rows, columns = lb.varying(left), lb.varying(right)
    weighs, scores = rows == {0} and columns == {0, 2}, rows == {0, 2} and columns == {0, 1}
    heads = _heads(recorder, call, call.args, apart=[scores, weighs or scores])
    if heads is not None:
        result = lb.along(heads, 0, call.results[0].shape)
        if weighs:
            values = right.select(1, 0)
            result = values.unsqueeze(1).expand(result.shape)
            _note(recorder, heads, values, None)
        elif scores:
            _note(recorder, heads, left.select(1, 0), right.select(2, 0))
        return recorder.set(call.results[0], result)
    if not columns and rows == {1}:  # positions are mixed, channel by channel
        return recorder.set(call.results[0], left.narrow(2, 0, 1).expand(call.results[0].shape))
    if not rows and columns == {2}:
        return recorder.set(call.results[0], right.narrow(1, 0, 1).expand(call.results[0].shape))
    return unknown(recorder, call) if rows or columns else no_labels(recorder, call)


def fused(recorder: Recorder, call: Call) -> None:
    """Apply fused attention to `(B, H, positions, width)` queries, keys and values, perhaps with a mask or bias."""
    heads = _heads(recorder, call, call.tensors)
    if heads is None:
        return unknown(recorder, call)
    no_labels(recorder, call)
    for result in call.results[:2]:  # what attention gives, and the logarithms of its sums
        if result.dim() > 2:
            recorder.set(result, lb.along(heads, 1, result.shape))
    return None


def _note(recorder: Recorder, heads: Tensor, left: Tensor, right: Tensor | None) -> None:
    """Note a product that leaves the coordinates inside the heads apart."""
    recording = recorder.recording
    recording.passes[-1].products[len(recording.nodes)] = left.reshape(-1)
    recording.inside.append(HeadProduct(len(recording.nodes), len(recording.passes) - 1, left, right, heads))


def _heads(recorder: Recorder, call: Call, operands: Sequence[Tensor], apart: Sequence[bool] = ()) -> Tensor | None:
    """Return labels of the heads, tied across operands `(..., heads, rows, columns)`; None where there are none.

    An operand that all heads share may lose nothing. Keys and values may have fewer heads, each for as many queries.
    Of operands whose coordinates stay `apart`, heads are tied whole only while nobody looks into them.
    """
    if not any(tensor.dim() - 3 in lb.varying(recorder.labels(tensor)) for tensor in operands):
        return None
    found: Tensor | None = None
    whole = any(apart)
    for place, tensor in enumerate(operands):
        labels, dim = recorder.labels(tensor), tensor.dim() - 3
        if dim < 0 or tensor.size(dim) == 1 or (found is None and dim not in lb.varying(labels)):
            freeze(recorder, call, labels, f"'{call.op}', in which all heads read the same,")
            continue
        others = set(range(labels.dim())) - {dim}
        line = joining.collapsed(recorder.ledger, labels, others, call.where, whole=whole and apart[place])
        vector = lb.vector_along(line, dim)
        assert vector is not None
        if found is None:
            found = vector
        elif found.numel() % vector.numel() == 0:
            spread = vector.repeat_interleave(found.numel() // vector.numel())
            recorder.ledger.unify(found, spread, call.where, whole=whole)
        else:
            freeze(recorder, call, labels, f"the operation '{call.op}'")
    if found is not None:
        recording = recorder.recording
        recording.heads.append(lb.channels_in(found))
        recording.passes[-1].products[len(recording.nodes)] = found
    return found if found is None or not whole else _own(recorder, found)


def _own(recorder: Recorder, heads: Tensor) -> Tensor:
    """Return labels of their own for heads: what is the same for all coordinates inside them."""
    numbers, places = np.unique(heads.numpy(), return_inverse=True)
    own = recorder.ledger.fresh(numbers.size)[torch.from_numpy(places)]
    recorder.ledger.unify(own, heads, whole=True)
    return own


TABLE: dict[str, Rule] = {
    "bmm": product,
    **dict.fromkeys(
        (
            *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
            *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
        ),
        fused,
    ),
}
