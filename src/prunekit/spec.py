"""What a network knows about itself besides its weights: where it came from and what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_ATTRIBUTE = "_prunekit_origin"


@dataclass(frozen=True)
class InputSpec:
    """One input image: its shape and how its channels are normalised.

    `shape` is `(C, H, W)`, without the batch. `mean` and `std` have `C` entries, in units of the `[0, 1]` pixel range.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON form; `from_json` reads it back."""
        return {"shape": list(self.shape), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputSpec:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no such thing.
        """
        if not all(isinstance(data[name], list) for name in ("shape", "mean", "std")):
            raise ValueError("a shape, mean or std that is no list")
        shape, mean, std = (tuple(data[name]) for name in ("shape", "mean", "std"))
        if not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"{list(shape)} is no shape")
        if len(shape) > 4:
            raise ValueError(f"{list(shape)} is no shape of one image")
        if not all(isinstance(value, int | float) for value in (*mean, *std)):
            raise ValueError("a mean or std that is no number")
        return cls(shape, mean, std)


@dataclass(frozen=True)
class Origin:
    """How a network can be built again, what it reads, and what was done to it.

    `arch` is a name that `prunekit.models.build` understands, `arch_args` its arguments, `classes` the class names
    (empty when unknown), and `history` one JSON object for each plan applied so far, oldest first.
    """

    arch: str
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    input: InputSpec | None = None
    classes: tuple[str, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()

    def after(self, step: Mapping[str, Any]) -> Origin:
        """The same origin with one more step of history."""
        return replace(self, history=(*self.history, step))


def remember(model: nn.Module, origin: Origin) -> nn.Module:
    """Attach `origin` to `model` (copies of the model keep it) and return the model."""
    setattr(model, _ATTRIBUTE, origin)
    return model


def origin_of(model: nn.Module) -> Origin | None:
    """What `remember` attached, or None."""
    return getattr(model, _ATTRIBUTE, None)
