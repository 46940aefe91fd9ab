"""Parity: how closely the outputs of a file agree with those of its network.

Networks with gates, and routers, decide: a saliency is above its threshold or not, an image goes here or there. Where
such a decision hinges on the last digits, two correct runtimes may decide and therefore answer differently. Images on
which that happens are counted separately; more than a few of them are a mismatch like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.errors import CheckFailed, InputError, counted
from prunekit.exporting.interface import batch_of, each, named_outputs
from prunekit.nn.buckets import Router
from prunekit.nn.gated import gated_layers
from prunekit.surgery.execution.hooks import hooked
from prunekit.surgery.execution.sources import as_inputs

Batch = tuple[Any, Tensor | None]
"""Normalised images `(N, ...)`, or a tuple of positional inputs, and the labels `(N,)` where they are known."""

TOLERANCE = 1e-4
_MOST_UNDECIDED = 0.01  # share of all images, and at least one
_LOGITS = "logits"


@dataclass(frozen=True)
class OutputParity:
    """One output tensor: `difference` is max |difference|, `scale` is max |value| of the network's.

    `exact` outputs, whose values are not floating-point numbers, may not differ at all.
    """

    name: str
    difference: float
    scale: float
    exact: bool = False

    def allowed(self, tolerance: float) -> float:
        """Return the largest difference allowed: `tolerance`, times the largest |value| where that is above one."""
        return 0.0 if self.exact else tolerance * max(1.0, self.scale)

    @property
    def relative(self) -> float:
        """The difference, relative as the tolerance is."""
        return self.difference / max(1.0, self.scale) if self.difference and not self.exact else self.difference


@dataclass(frozen=True)
class Parity:
    """Comparison of a file's outputs with the network's, over `images` inputs.

    `outputs` has one entry for each output tensor; `worst` is the name of the one that differs most, `difference` and
    `scale` its figures. `agreement` is the share of images with the same top class, by the output called `logits` or
    else the first (None where that is not `(N, classes)`); the `undecided` images, whose gates or route hinge on
    rounding and came out differently, are left out of both. With labels, `accuracy` is the network's and
    `exported_accuracy` the file's, over all images. Shares are from 0 to 1.
    """

    outputs: tuple[OutputParity, ...]
    agreement: float | None
    images: int
    accuracy: float | None = None
    exported_accuracy: float | None = None
    undecided: int = 0

    @property
    def _worst(self) -> OutputParity:
        # a difference in an exact output outweighs any other
        return max(self.outputs, key=lambda output: (output.exact and output.difference > 0, output.relative))

    @property
    def worst(self) -> str:
        """The name of the output that differs most."""
        return self._worst.name

    @property
    def difference(self) -> float:
        """Max |difference| of that output."""
        return self._worst.difference

    @property
    def scale(self) -> float:
        """Max |value| of that output in the network."""
        return self._worst.scale

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        worst = {name: getattr(self, name) for name in ("worst", "difference", "scale")}
        return {**worst, **vars(self), "outputs": [dict(vars(output)) for output in self.outputs]}


def compare(
    model: nn.Module,
    runtime: nn.Module,
    batches: Iterable[Batch],
    fixed_batch: int | None = None,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Run both on the same inputs, in batches of `fixed_batch` where the file takes no other size.

    Args:
        model: The network.
        runtime: The file in its runtime, called as the network is.
        batches: Inputs, with labels where they are known.
        fixed_batch: The only batch size that the file takes; None for any.
        tolerance: The largest relative difference, which is also the margin of undecided images.

    Raises:
        CheckFailed: The file has other outputs than the network.
    """
    tally = _Tally(tolerance, partial(hangs_on_rounding, model, margin=tolerance))
    with torch.inference_mode():
        for images, labels in sized(batches, fixed_batch):
            inputs = as_inputs(images)
            tally.add(inputs, model(*inputs), runtime(*inputs), labels)
    return tally.parity()


def require(parity: Parity, tolerance: float = TOLERANCE, min_agreement: float = 1.0, what: str = "") -> None:
    """Raise `CheckFailed` where the file does not agree with its network.

    Args:
        parity: The comparison.
        tolerance: The largest difference of an output, relative to its largest |value| where that is above one.
        min_agreement: The least share of images with the same top class.
        what: The name of the exported network, for the message.
    """
    subject = f"the exported {what or 'network'}"
    for output in sorted(parity.outputs, key=lambda output: output.name != parity.worst):
        allowed = output.allowed(tolerance)
        if not output.difference <= allowed:
            named = f"output '{output.name}' differs" if len(parity.outputs) > 1 else "outputs differ"
            limit = "it must be equal" if output.exact else f"{allowed:.1e} is allowed"
            raise CheckFailed(
                f"{subject}'s {named} from the model's by {output.difference:.1e}, and {limit}; nothing was written",
                hint=None if output.exact else "a larger --tolerance allows more",
            )
    if parity.undecided > max(1.0, _MOST_UNDECIDED * parity.images):
        raise CheckFailed(
            f"{subject} decides otherwise on {parity.undecided} of {counted(parity.images, 'image')}, where saliencies "
            "or routes hang on rounding; nothing was written",
            hint="thresholds of another budget (--budget) may lie where fewer saliencies do",
        )
    if parity.agreement is not None and parity.agreement < min_agreement:
        raise CheckFailed(
            f"{subject} names {1 - parity.agreement:.2%} of {counted(parity.images, 'image')} otherwise; "
            "nothing was written",
            hint="--min-agreement 0.999 allows a thousandth, where two classes are as good as tied",
        )


def sized(batches: Iterable[Batch], size: int | None) -> Iterator[Batch]:
    """Yield the same images in batches of the one `size` that the file takes; a rest that fills none is left out."""
    if size is None:
        yield from batches
        return
    rest: Batch | None = None
    for batch in batches:
        whole = batch if rest is None else _joined(rest, batch)
        count = batch_of(whole[0]) or 1
        for start in range(0, count - size + 1, size):
            yield _part(whole, slice(start, start + size))
        rest = _part(whole, slice(count - count % size, count)) if count % size else None


def _joined(first: Batch, second: Batch) -> Batch:
    one, other = batch_of(first[0]), batch_of(second[0])

    def join(a: Any, b: Any) -> Any:
        both = isinstance(a, Tensor) and a.dim() and (len(a), len(b)) == (one, other)
        return torch.cat((a, b)) if both else a

    joined: Batch = tree_map(join, first, second)
    return joined


def _part(batch: Batch, which: slice) -> Batch:
    inputs, labels = batch
    return each(inputs, lambda tensor: tensor[which]), labels if labels is None else labels[which]


def hangs_on_rounding(model: nn.Module, inputs: Any, margin: float) -> Tensor:
    """Return for each image whether a decision of `model` is so close that rounding may turn it, `(N,)`.

    That is a saliency within `margin` of its threshold, relative to the largest saliency of its layer, or two buckets
    whose scores in the router are within `margin` of each other, relative to the largest score.
    """
    device = next((leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    near = torch.zeros(batch_of(inputs) or 1, dtype=torch.bool, device=device)

    def at_threshold(_: nn.Module, __: Any, pi: Tensor, *, threshold: Tensor) -> None:
        if threshold > 0:  # at a threshold of zero both sides give zero
            near.logical_or_(((pi - threshold).abs() <= margin * pi.max()).any(1))

    def at_fork(_: nn.Module, __: Any, scores: Tensor) -> None:
        best = scores.topk(2, dim=1).values
        near.logical_or_(best[:, 0] - best[:, 1] <= margin * scores.abs().max())

    looks: list[tuple[nn.Module, Callable[..., None]]] = [
        (layer.gate, partial(at_threshold, threshold=layer.threshold)) for _, layer in gated_layers(model)
    ]
    looks += [(module, at_fork) for module in model.modules() if isinstance(module, Router)]
    with hooked(module.register_forward_hook(look) for module, look in looks):
        model(*as_inputs(inputs))
    return near.cpu()


class _Tally:
    """Running totals of a comparison."""

    def __init__(self, tolerance: float, hangs: Callable[[tuple[Any, ...]], Tensor]) -> None:
        self.tolerance, self.hangs = tolerance, hangs
        self.outputs: dict[str, OutputParity] = {}
        self.seen = self.same = self.undecided = self.labelled = self.right = self.exported_right = 0
        self.classifies = True

    def add(self, inputs: tuple[Any, ...], wanted: Any, found: Any, labels: Tensor | None) -> None:
        """Add one batch and its outputs, `wanted` from the network and `found` from the file."""
        count = batch_of(inputs) or 1
        pairs = _paired(named_outputs(wanted), list(named_outputs(found).values()))
        gaps = {name: _gaps(*pair, count) for name, pair in pairs.items()}
        self.seen += count
        self.outputs = {name: self._scaled(name, want) for name, (want, _) in pairs.items()}
        logits, exported = pairs.get(_LOGITS) or next(iter(pairs.values()))
        self.classifies = self.classifies and logits.dim() == 2 and len(logits) == count
        same = torch.ones(count, dtype=torch.bool)
        if self.classifies:
            same = logits.argmax(1) == exported.argmax(1)
        suspect = ~same
        for name, gap in gaps.items():
            suspect = suspect | (gap > self.outputs[name].allowed(self.tolerance))
        counted = ~(suspect & self.hangs(inputs)) if bool(suspect.any()) else torch.ones_like(same)
        self.undecided += int((~counted).sum())
        self.same += int((same & counted).sum())
        for name, gap in gaps.items():
            largest = float(gap[counted].max()) if bool(counted.any()) else 0.0
            output = self.outputs[name]
            self.outputs[name] = replace(output, difference=max(output.difference, largest))
        if self.classifies and labels is not None:
            self.labelled += len(labels)
            self.right += int((logits.argmax(1) == labels.cpu()).sum())
            self.exported_right += int((exported.argmax(1) == labels.cpu()).sum())

    def _scaled(self, name: str, wanted: Tensor) -> OutputParity:
        """Return the output's figures so far, with the scale of `wanted` included."""
        before = self.outputs.get(name) or OutputParity(name, 0.0, 0.0, exact=_exact(wanted))
        values = _numbers(wanted)
        values = values[values.isfinite()]
        return replace(before, scale=max(before.scale, float(values.abs().max()) if values.numel() else 0.0))

    def parity(self) -> Parity:
        """Return the comparison as a whole."""
        if not self.seen:
            raise InputError("there are no images to compare the exported network on")
        labelled = self.labelled == self.seen
        return Parity(
            outputs=tuple(self.outputs.values()),
            agreement=self.same / max(1, self.seen - self.undecided) if self.classifies else None,
            images=self.seen,
            accuracy=self.right / self.seen if labelled else None,
            exported_accuracy=self.exported_right / self.seen if labelled else None,
            undecided=self.undecided,
        )


def _paired(wanted: Mapping[str, Tensor], found: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair each output of the network with the file's at the same position.

    Raises:
        CheckFailed: The file has more or fewer outputs, or one of another shape or dtype.
    """
    if len(wanted) != len(found):
        raise CheckFailed(f"the exported network gives {len(found)} outputs instead of {len(wanted)}")
    for (name, want), have in zip(wanted.items(), found, strict=True):
        which = f"output '{name}'" if len(wanted) > 1 else "outputs"
        if want.shape != have.shape:
            shapes = f"{tuple(have.shape)} instead of {tuple(want.shape)}"
            raise CheckFailed(f"the exported network gives {which} of shape {shapes}; nothing was written")
        if want.dtype != have.dtype:
            kinds = f"{have.dtype} instead of {want.dtype}"
            raise CheckFailed(f"the exported network gives {which} of type {kinds}; nothing was written")
    return {name: (want.cpu(), have.cpu()) for (name, want), have in zip(wanted.items(), found, strict=True)}


def _gaps(wanted: Tensor, found: Tensor, count: int) -> Tensor:
    """Return max |difference| of each image, `(count,)`; of the whole output where it has no entry per image."""
    if not wanted.numel():
        return torch.zeros(count, dtype=torch.float64)
    gaps = (_numbers(wanted) - _numbers(found)).abs()
    if _exact(wanted):
        gaps = gaps.clamp(min=1.0)  # beyond 2^53, distinct integers may be equal in float64
    # equal infinities do not differ; a comparison with NaN is never true, so NaN shows as an infinite difference
    gaps = gaps.masked_fill(wanted == found, 0.0).nan_to_num(math.inf, math.inf)
    if wanted.dim() and len(wanted) == count:
        return gaps.reshape(count, -1).amax(1)
    return gaps.max().expand(count)


def _exact(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex())


def _numbers(values: Tensor) -> Tensor:
    """Convert values to a dtype in which they can be subtracted."""
    return values if values.is_complex() else values.double()
