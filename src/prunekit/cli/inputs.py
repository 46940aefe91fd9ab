"""Example inputs of networks that take more than one image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.cli.models import spec_of
from prunekit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

_KINDS = ("int64", "int32", "uint8", "bool")


def example_inputs(network: nn.Module, sizes: str | None) -> tuple[Tensor, ...]:
    """Return inputs of the `sizes` of --inputs, or else the one image that the network reads; all with a batch of one.

    Raises:
        InputError: Something in `sizes` is no size, or the network's input is unknown.
    """
    import torch

    if sizes is None:
        return (_zeros(network, (1, *spec_of(network).shape)),)
    generator = torch.Generator().manual_seed(0)
    example = []
    for text in sizes.split(","):
        shape, kind = _size(text)
        if kind is None:
            example.append(_zeros(network, shape))
        else:  # zeros and ones are valid as classes, as words and as masks
            example.append(torch.randint(2, shape, generator=generator).to(getattr(torch, kind)))
    return tuple(example)


def _zeros(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    import torch

    from prunekit.surgery.tracing.tracer import example_of

    return torch.zeros_like(example_of(network, shape), device="cpu")


def _size(text: str) -> tuple[tuple[int, ...], str | None]:
    """Parse `3x64x64` or `16:int64` into a shape with a batch of one, and the dtype where it is given."""
    size, _, kind = text.strip().lower().partition(":")
    parts = size.split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts) or kind not in ("", *_KINDS):
        raise InputError(
            f"--inputs has '{text}', which is no size",
            hint=f"expected sizes such as 3x64x64 or 6, or 16:int64 (or {', '.join(_KINDS[1:])}) for whole numbers",
        )
    return (1, *map(int, parts)), kind or None
