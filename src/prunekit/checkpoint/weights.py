"""Load weights into a network: built empty, compared key by key, and filled only when everything fits."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import models
from prunekit.checkpoint import foreign
from prunekit.errors import InputError
from prunekit.models import known
from prunekit.models.known import Known
from prunekit.models.unallocated import NoNormalDraws, OnlyComputed, at_most

_SHOWN = 3
_UNKNOWN = (
    "arch (--arch) names it: a bundled one or torchvision's (prunekit archs lists them), or path/to/file.py:callable"
)


class MisfitError(InputError):
    """The keys of a state dict are not those of the architecture."""


def from_state_dicts(
    found: Mapping[str, Mapping[str, Tensor]], arch: str, args: Mapping[str, Any] | None, name: str
) -> nn.Module:
    """Build `arch` with the weights of the only state dict in `found`, or part of one, that fits it.

    Args:
        found: State dicts by their places, see `foreign`.
        arch: The name of the architecture.
        args: Its arguments.
        name: The name of the file, for error messages.

    Raises:
        InputError: The keys do not fit, or several state dicts fit, such as weights and their moving average.
    """
    blank = empty(arch, dict(args or {}))
    parts = {
        ".".join(filter(None, (place, prefix))): part
        for place, state in found.items()
        for prefix, part in models.parts_that_fit(blank, state).items()
    }
    if len(parts) == 1:
        return from_state_dict(foreign.only(parts, name, ""), arch, args, name, blank)
    fitting, problems = {}, {}
    for place, state in parts.items():
        try:
            fitting[place] = from_state_dict(state, arch, args, name)
        except InputError as error:
            problems[place] = error
    if fitting:
        model: nn.Module = foreign.only(fitting, name, f"networks that fit {arch}")
        return model
    raise problems[max(parts, key=lambda place: len(parts[place]))]


def recognised(
    found: Mapping[str, Mapping[str, Tensor]], args: Mapping[str, Any] | None, name: str
) -> tuple[nn.Module, str]:
    """Return the only known network that fits a state dict in `found`, with these weights, and the flags that name it.

    Args:
        found: State dicts by their places, see `foreign`.
        args: Arguments that the architecture is known to have.
        name: The name of the file, for error messages.

    Raises:
        InputError: None fits, or several do; the message names the nearest, and how it differs, or all that fit.
    """
    for key, state in found.items():
        check_backed(state, f"{name} at {key}" if key else name)
    given = dict(args or {})
    fitting: dict[str, nn.Module] = {}
    for one in _candidates(found):
        if all(one.args.get(key, value) == value for key, value in given.items()):
            with contextlib.suppress(MisfitError):
                own = {**one.args, **given}
                fitting[_flags(one.arch, own)] = from_state_dicts(found, one.arch, own, name)
    if len(fitting) == 1:
        ((flags, model),) = fitting.items()
        return model, flags
    unsaid = f"{name} is a state dict, which does not say its architecture"
    if fitting:
        raise InputError(f"{unsaid}; {len(fitting)} fit", hint="say which: " + ", or ".join(fitting))
    raise InputError(unsaid + _nearest(found, given, name), hint=_UNKNOWN)


def _candidates(found: Mapping[str, Mapping[str, Tensor]]) -> list[Known]:
    """Return the known networks with the shapes of a state dict, or of the part of one under some prefix."""
    for parts in (found.values(), [part for state in found.values() for part in models.by_prefix(state).values()]):
        candidates = [one for state in parts for one in known.fitting(_shapes(state))]
        if candidates:
            return list({(one.arch, str(one.args)): one for one in candidates}.values())
    return []


def _nearest(found: Mapping[str, Mapping[str, Tensor]], args: Mapping[str, Any], name: str) -> str:
    """Return the end of the sentence that no known network fits: the nearest, and what differs."""
    nearest = known.nearest(_shapes(max(found.values(), key=len)))
    if nearest is None:
        return ", and no known network is like it"
    try:
        from_state_dicts(found, nearest.arch, args, name)
    except InputError as error:
        return f"; the nearest is {nearest.arch}: {error.message}"
    return f"; with --arch {nearest.arch} it fits"


def _flags(arch: str, args: Mapping[str, Any]) -> str:
    given = ",".join(f"{key}={value}" for key, value in args.items())
    return f"--arch {arch}" + (f" --arch-args {given}" if given else "")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def from_state_dict(
    state: Mapping[str, Tensor], arch: str, args: Mapping[str, Any] | None, name: str, blank: nn.Module | None = None
) -> nn.Module:
    """Build `arch` with the weights of a foreign state dict, in the architecture's own dtype.

    Keys are translated by `models.match_keys`. Without `num_classes` in `args`, the number of classes is taken from the
    weights. `blank` is the architecture, where `empty` has built it already.

    Raises:
        InputError: The keys do not fit; the message lists them.
    """
    check_backed(state, name)
    args = dict(args or {})
    model = blank or empty(arch, args)
    matched = models.match_keys(model, state)
    classes = _classes(model, matched)
    if classes is not None and "num_classes" not in args:
        args["num_classes"] = classes
        model = empty(arch, args)
    check_fit(model, matched, f"{name} does not fit {arch}")
    model = on_cpu(model, arch, args)
    model.load_state_dict(matched)
    return model


def empty(arch: str, args: Mapping[str, Any], modules: int | None = None) -> nn.Module:
    """Build the network without memory for its weights, since a file may ask for any size.

    Code of the user's own is built as usual. `modules` is the largest number of modules allowed.

    Raises:
        InputError: The arguments do not suit, or there are more modules.
    """
    if models.is_code(arch):
        return models.build(arch, args)
    with at_most(modules):
        try:
            with torch.device("meta"), NoNormalDraws():
                return models.build(arch, args)
        except InputError:
            if not arch.startswith(("torchvision:", "timm:")):
                raise
        with OnlyComputed():
            return models.build(arch, args)


def on_cpu(model: nn.Module, arch: str, args: Mapping[str, Any]) -> nn.Module:
    """Allocate a model of `empty` on the CPU; values that no state dict holds are those of a fresh network."""
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return model
    if any(module._non_persistent_buffers_set for module in model.modules()):
        return models.build(arch, args)
    return model.to_empty(device="cpu")


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the tensors of `state` into the model as they are, dtype included; tied parameters stay tied.

    Raises:
        InputError: A tensor has integers where the model has floating-point numbers, or the other way round.
    """
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() != state[key].is_floating_point():
            raise InputError(f"'{key}' is {state[key].dtype}, expected {tensor.dtype}")
        tensor.data = state[key]


def check_backed(state: Mapping[str, Tensor], name: str) -> None:
    """Raise `InputError` for a tensor that claims more elements than the file holds for it."""
    for key, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise InputError(f"{name}: '{key}' is sparse or quantised, expected a plain tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{name} is damaged: '{key}' claims the shape {tuple(tensor.shape)} with less data")


def check_fit(model: nn.Module, state: Mapping[str, Tensor], headline: str) -> None:
    """Raise `InputError` listing the keys that are missing, unexpected, or of another shape."""
    expected = model.state_dict()
    other_shape = [
        f"{key} {tuple(state[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    differences = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": other_shape,
    }
    found = [f"{len(keys)} {what} ({_listed(keys)})" for what, keys in differences.items() if keys]
    if found:
        raise MisfitError(
            f"{headline}: {'; '.join(found)}",
            hint="arch (--arch) and arch_args (--arch-args) must say exactly what network the weights are of",
        )


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")


def _classes(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of the weights, where the classifier differs in nothing else."""
    name = models.classifier(model)
    weight = state.get(f"{name}.weight")
    if name is None or weight is None or weight.dim() == 0:
        return None
    own = model.get_submodule(name).weight
    if not isinstance(own, Tensor) or weight.shape[1:] != own.shape[1:] or weight.shape[0] == own.shape[0]:
        return None
    return weight.shape[0]
