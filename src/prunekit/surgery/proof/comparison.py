"""The outputs of two networks on the same inputs, held against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import SurgeryError
from prunekit.surgery.execution.outputs import tensors_of

TOLERANCE = {torch.float64: 1e-10}
DEFAULT_TOLERANCE = 1e-4
_FAINT = 1e-3  # an output that varies by less than this share of its size hardly follows the input


@dataclass(frozen=True)
class Comparison:
    """Two networks on the same inputs: the largest difference relative to how far the output follows the input."""

    difference: float
    tolerance: float
    faint: bool

    @property
    def equal(self) -> bool:
        """True if both compute the same; NaN is a difference."""
        return self.difference <= self.tolerance


def compared(wanted: list[dict[str, Tensor]], found: list[dict[str, Tensor]]) -> Comparison:
    """Compare outputs of the reference and of the candidate, as `values_of` gives them, for each of some inputs.

    Floating-point values may differ a little; all others, such as indices and masks, must be equal.

    Raises:
        SurgeryError: other tensors or shapes, or nothing that could be compared.
    """
    worst, tolerance, faint, something = 0.0, 0.0, True, False
    for want, have in zip(wanted, found, strict=True):
        _check_structure(want, have)
    for place, first in wanted[0].items():
        scale = 1.0
        pairs = [(want[place], have[place]) for want, have in zip(wanted, found, strict=True) if place in want]
        if first.is_floating_point() and first.numel():
            size, follows = _liveliness(place, [want for want, _ in pairs])
            scale, something = max(follows, _FAINT * size), True
            faint = faint and follows < _FAINT * size
            tolerance = max(tolerance, TOLERANCE.get(first.dtype, DEFAULT_TOLERANCE))
        for want_one, have_one in pairs:
            worst = _worse(worst, _gap(want_one, have_one, scale))
    if not something:
        raise SurgeryError(
            "the model returns no floating-point tensor, so nothing can be verified",
            hint="return what the result is made from as well, such as the scores behind an argmax",
        )
    return Comparison(worst, tolerance, faint)


def values_of(output: Any) -> dict[str, Tensor]:
    """Return the tensors of an output as they are compared: dense, complex numbers as pairs, safe from later runs."""
    values = {}
    for place, tensor in tensors_of(output).items():
        dense = tensor.dequantize() if tensor.is_quantized else tensor
        dense = dense if dense.layout == torch.strided else dense.to_dense()
        values[place] = (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).detach().clone()
    return values


def _check_structure(want: dict[str, Tensor], have: dict[str, Tensor]) -> None:
    if want.keys() != have.keys():
        lost, new = ([place for place in one if place not in other] for one, other in ((want, have), (have, want)))
        what = f"does not return 'output{lost[0]}'" if lost else f"returns 'output{new[0]}'"
        raise SurgeryError(f"the pruned network {what}, unlike the original")
    for place in want:
        pair = (want[place], have[place])
        shapes, kinds = ([tuple(t.shape) for t in pair], [t.dtype for t in pair])
        if shapes[0] != shapes[1] or kinds[0] != kinds[1]:
            was, now = (
                f"{shape}, {str(kind).removeprefix('torch.')}" for shape, kind in zip(shapes, kinds, strict=True)
            )
            raise SurgeryError(f"'output{place}' of the pruned network is of shape {now}, not {was}")


def _liveliness(place: str, values: list[Tensor]) -> tuple[float, float]:
    """Return the size of an output, and how far it follows the input."""
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise SurgeryError(f"'output{place}' is not finite on random inputs, so nothing can be verified")
    size = max(float(value.abs().max()) for value in values if value.numel())
    if len(values) == 1 or len({value.shape for value in values}) > 1:
        return size, size
    return size, float((values[0] - values[-1]).abs().max())


def _gap(want: Tensor, have: Tensor, scale: float) -> float:
    if not want.is_floating_point():
        return float(not torch.equal(want, have))
    return float((want - have).abs().max()) / max(scale, 1e-30) if want.numel() else 0.0


def _worse(worst: float, gap: float) -> float:
    """Return the larger one, or NaN."""
    return gap if gap != gap or gap > worst else worst
