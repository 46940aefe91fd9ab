"""Resolve the name of an architecture and build the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from prunekit.errors import InputError, unknown_name
from prunekit.models import timm_zoo, torchvision_zoo, user_code
from prunekit.models.arguments import check_args
from prunekit.models.catalog import CATALOG
from prunekit.models.keys import match_keys
from prunekit.spec import InputSpec, Origin, remember


@dataclass(frozen=True)
class ResolvedName:
    """A resolved architecture name: its kind, its full name there, and the weights asked for."""

    kind: Literal["bundled", "torchvision", "timm", "code"]
    name: str
    weights: str | None = None

    @property
    def arch(self) -> str:
        """The unambiguous name, without weights: an artefact brings its own."""
        return f"{self.kind}:{self.name}" if self.kind in ("torchvision", "timm") else self.name


def resolve(arch: str) -> ResolvedName:
    """Resolve the name of an architecture without importing any of the user's code.

    `prunekit:NAME`, `torchvision:NAME[@WEIGHTS]` and `timm:NAME` say where to look. A bare name is looked for among the
    bundled ones, then torchvision's, then the bundled ones with `_cifar` appended. Any other `A:B` is a callable in
    code.

    Raises:
        InputError: The name is unknown; the message suggests the nearest ones.
    """
    prefix, colon, rest = arch.partition(":")
    if prefix == "prunekit" and colon:
        return _bundled(rest) or _unknown(rest, names())
    if prefix == "torchvision" and colon:
        return _torchvision(rest) or _unknown(rest, torchvision_zoo.names())
    if prefix == "timm" and colon and rest != "create_model":  # that is a callable, as one names any other
        return ResolvedName("timm", rest)
    if colon:
        return ResolvedName("code", arch)
    exact = ResolvedName("bundled", arch) if arch in CATALOG else None
    found = exact or _torchvision(arch) or _bundled(arch)
    return found or _unknown(arch, [*names(), *torchvision_zoo.names()])


def build(
    arch: str,
    args: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
) -> nn.Module:
    """Build a network in eval mode that remembers its origin: architecture, arguments, and intended input.

    Args:
        arch: The name of an architecture, see `resolve`.
        args: Keyword arguments of the architecture.
        num_classes: The argument of that name.

    Weights are random, drawn from torch's global generator, except with `torchvision:NAME@WEIGHTS`.

    Raises:
        InputError: The name is unknown, the arguments do not suit, or the user's code fails.
    """
    reference = resolve(arch)
    args = dict(args or {})
    if num_classes is not None:
        args["num_classes"] = num_classes
    build_one = {"bundled": _build_bundled, "torchvision": _build_torchvision, "timm": _build_timm, "code": _build_code}
    model, origin = build_one[reference.kind](reference, args)
    return remember(model.eval(), origin)


def names() -> list[str]:
    """Return the names of the bundled architectures."""
    return sorted(CATALOG)


def default_input(arch: str, args: Mapping[str, Any] | None = None) -> InputSpec | None:
    """Return the input that an architecture is meant for; None for the user's own code, which does not say."""
    reference = resolve(arch)
    if reference.kind == "bundled":
        return _bundled_input(reference.name, args or {})
    if reference.kind == "torchvision":
        return torchvision_zoo.default_input(reference.name, reference.weights, args or {})
    if reference.kind == "timm":
        return timm_zoo.default_input(reference.name, args or {})
    return None


def canonical(arch: str) -> str:
    """Return the unambiguous name of an architecture, as an artefact stores it: without published weights."""
    return resolve(arch).arch


def is_code(arch: str) -> bool:
    """Return whether building `arch` runs code that none of prunekit, torchvision and timm ships."""
    return resolve(arch).kind == "code"


def takes(arch: str, argument: str) -> bool:
    """Return whether user code accepts an argument of this name, which runs the code; True for other architectures."""
    reference = resolve(arch)
    return reference.kind != "code" or user_code.accepts(reference.name, argument)


def _bundled(name: str) -> ResolvedName | None:
    for known in (name, f"{name}_cifar"):
        if known in CATALOG:
            return ResolvedName("bundled", known)
    return None


def _torchvision(text: str) -> ResolvedName | None:
    name, _, weights = text.partition("@")
    return ResolvedName("torchvision", name, weights or None) if name in torchvision_zoo.names() else None


def _unknown(arch: str, known: list[str]) -> ResolvedName:
    raise unknown_name("architecture", arch, known)


def _build_bundled(reference: ResolvedName, args: dict[str, Any]) -> tuple[nn.Module, Origin]:
    entry = CATALOG[reference.name]
    check_args(reference.name, entry.make, args, entry.fixed)
    try:
        model = entry.make(**{**entry.defaults, **args, **entry.fixed})
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise InputError(f"{reference.name} cannot be built so large: {error}") from error
    return model, Origin(reference.arch, args, _bundled_input(reference.name, args))


def _bundled_input(name: str, args: Mapping[str, Any]) -> InputSpec:
    entry = CATALOG[name]
    channels = args.get("in_channels", entry.input.shape[0])
    if channels == entry.input.shape[0]:
        return entry.input
    return InputSpec((channels, *entry.input.shape[1:]))


def _build_torchvision(reference: ResolvedName, args: dict[str, Any]) -> tuple[nn.Module, Origin]:
    name, weights = reference.name, reference.weights
    given = {**(torchvision_zoo.weights_args(name, weights) if weights else {}), **args}
    model, used = torchvision_zoo.build(name, given)
    origin = Origin(reference.arch, used, torchvision_zoo.default_input(name, weights, used))
    if weights is None:
        return model, origin
    state = match_keys(model, torchvision_zoo.download(name, weights))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"torchvision's weights {weights} do not fit {name} with {args}") from error
    return model, Origin(origin.arch, used, origin.input, torchvision_zoo.categories(name, weights))


def _build_timm(reference: ResolvedName, args: dict[str, Any]) -> tuple[nn.Module, Origin]:
    model = timm_zoo.build(reference.name, args)
    return model, Origin(reference.arch, args, timm_zoo.default_input(reference.name, args))


def _build_code(reference: ResolvedName, args: dict[str, Any]) -> tuple[nn.Module, Origin]:
    if "num_classes" in args and not user_code.accepts(reference.name, "num_classes"):
        raise InputError(
            f"{reference.name} takes no num_classes, and {args['num_classes']} classes were asked for",
            hint="give the callable an argument num_classes, or build the right number of classes in it",
        )
    return user_code.build(reference.name, args), Origin(reference.arch, args)
