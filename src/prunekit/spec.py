"""Metadata of a network besides its weights: its origin and its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prunekit.errors import InputError, counted

if TYPE_CHECKING:
    from torch import nn

_ATTRIBUTE = "_prunekit_origin"


@dataclass(frozen=True)
class InputSpec:
    """One input image: its shape and the normalisation of its channels.

    `shape` is `(C, H, W)`, without the batch. `mean` and `std` have `C` entries, in units of the `[0, 1]` pixel range.
    `assumed` says that nobody has stated this normalisation: it is what the architecture usually has, or is left open.

    Examples:
        >>> import prunekit as pk
        >>> gray = pk.InputSpec((1, 28, 28), mean=(0.1307,), std=(0.3081,))
        >>> pk.inspect(pk.load("prunekit:lenet_300_100", input_spec=gray)).graph.example_shapes
        ((1, 1, 28, 28),)
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    assumed: bool = field(default=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `from_json` reads it back."""
        assumed = {"assumed": True} if self.assumed else {}
        return {"shape": list(self.shape), "mean": list(self.mean), "std": list(self.std), **assumed}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputSpec:
        """Read the JSON that `to_json` wrote.

        Raises:
            ValueError: It is anything else.
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
        return cls(shape, mean, std, data.get("assumed") is True)


def stated(
    known: InputSpec | None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: Sequence[int] | None = None,
) -> InputSpec | None:
    """Return a network's input: `known`, with what is stated in its place; None where its shape is not known.

    One number of `mean` or `std` stands for all channels; `size` is `(side,)`, `(H, W)` or `(C, H, W)`.

    Raises:
        InputError: What is stated makes no sense, or not for images of that many channels.
    """
    shape = known.shape if known else ()
    if size is not None:
        if not 0 < len(size) < 4 or not all(type(length) is int and length > 0 for length in size):
            raise InputError(f"input_size {size} is not a size", hint="expected such as 224, (32, 48) or (3, 32, 32)")
        channels = shape[:1] or (3,)
        shape = (*channels, *size, *size) if len(size) == 1 else (*channels, *size) if len(size) == 2 else tuple(size)
    if not shape:
        if mean or std:
            raise InputError("mean and std need an input size", hint="say it with input_size (--input-size 3x32x32)")
        return None
    found = {"mean": known.mean if known else (), "std": known.std if known else ()}
    for name, values in (("mean", mean), ("std", std)):
        if values:
            found[name] = tuple(values) * (shape[0] if len(values) == 1 else 1)
            if len(found[name]) != shape[0]:
                count, channels_named = counted(len(values), "value"), counted(shape[0], "channel")
                raise InputError(f"{name} has {count}, the images have {channels_named}")
    if min(found["std"], default=1.0) <= 0:
        raise InputError(f"std must be positive, found {', '.join(f'{value:g}' for value in found['std'])}")
    assumed = not (mean and std) and (known is None or known.assumed)
    return InputSpec(shape, found["mean"], found["std"], assumed)


@dataclass(frozen=True)
class Origin:
    """Origin of a network: how to build it again, its input, and its history.

    `arch` is a name that `prunekit.models.build` understands (empty when unknown), `arch_args` its arguments, `classes`
    the names of a classifier's outputs in their order (empty when unknown), and `history` one JSON object for each plan
    applied so far, oldest first.
    """

    arch: str
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    input: InputSpec | None = None
    classes: tuple[str, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()

    def after(self, step: Mapping[str, Any]) -> Origin:
        """Return the same origin with one more step of history."""
        return replace(self, history=(*self.history, step))


def remember(model: nn.Module, origin: Origin) -> nn.Module:
    """Attach `origin` to `model` (copies of the model keep it) and return the model."""
    setattr(model, _ATTRIBUTE, origin)
    return model


def origin_of(model: nn.Module) -> Origin | None:
    """Return the origin that `remember` attached, or None."""
    return getattr(model, _ATTRIBUTE, None)


def classes_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a classifier's outputs, in their order; none where they are unknown."""
    origin = origin_of(model)
    return origin.classes if origin else ()


def remember_classes(model: nn.Module, classes: tuple[str, ...]) -> nn.Module:
    """Make `classes` the names of the outputs in the model's origin, in place, and return the model."""
    return remember(model, replace(origin_of(model) or Origin(""), classes=classes))
