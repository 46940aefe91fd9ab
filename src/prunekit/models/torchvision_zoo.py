"""torchvision's classification networks by name, with random weights or with those it offers for download."""

from __future__ import annotations

import contextlib
import inspect
import sys
import typing
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from prunekit.errors import InputError, unknown_name
from prunekit.spec import InputSpec

# Inception networks: the auxiliary heads serve training only, and the slow truncated-normal initialisation is being
# retired.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


# Image size of torchvision's vision transformers, unless an argument sets another.
_IMAGE_SIZE = 224

# Arguments of builders that ask for published weights, including those of older versions.
_FETCHING = ("weights", "pretrained", "progress")

# Errors that the networks raise for arguments that they cannot be built with.
_UNSUITABLE = (
    *(TypeError, ValueError, AttributeError, AssertionError, RuntimeError),
    *(ArithmeticError, LookupError, MemoryError),
)


def names() -> list[str]:
    """Return the names of all classification networks of the installed torchvision."""
    from torchvision import models

    return list(models.list_models(module=models))


def build(name: str, args: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network with random weights; return it with the arguments that it was built with."""
    from torchvision import models

    _check_name(name)
    _check_arguments(name, args)
    used = {**_DEFAULTS.get(name, {}), **args}
    try:
        return models.get_model(name, weights=None, **used), used
    except _UNSUITABLE as error:
        raise InputError(f"torchvision's {name} does not take {_written(args)}: {_first_line(error)}") from error


def check_no_download(name: str, args: Mapping[str, Any]) -> None:
    """Raise `InputError` for an argument that would fetch weights; imports nothing."""
    if any(key.startswith(_FETCHING) for key in args):
        raise InputError(
            "weights are no argument of an architecture", hint=f"torchvision:{name}@WEIGHTS downloads them"
        )


def weight_names(name: str) -> list[str]:
    """Return the names of the published weights of a network."""
    from torchvision import models

    return list(models.get_model_weights(name).__members__)


def weights_args(name: str, weights: str) -> dict[str, Any]:
    """Return the arguments with which the network fits the published `weights`."""
    return {"num_classes": len(_weights(name, weights).meta["categories"]), **variant_args(name, weights)}


def variant_args(name: str, weights: str) -> dict[str, Any]:
    """Return the arguments, beside the number of classes, with which the network fits the published `weights`."""
    if name in _DEFAULTS:
        return {"transform_input": True}
    return {"image_size": _weights(name, weights).meta["min_size"][0]} if name.startswith("vit_") else {}


def download(name: str, weights: str) -> dict[str, Tensor]:
    """Download the published state dict, check its hash, and read it without unpickling anything but tensors.

    Raises:
        InputError: The weights are unknown or cannot be downloaded.
    """
    entry = _weights(name, weights)
    try:
        # torch announces the download on stdout, which is reserved for data
        with contextlib.redirect_stdout(sys.stderr):
            state: dict[str, Tensor] = entry.get_state_dict(
                progress=False, check_hash=True, weights_only=True, map_location="cpu"
            )
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot download torchvision:{name}@{weights}: {error}") from error
    return state


def categories(name: str, weights: str) -> tuple[str, ...]:
    """Return the class names of the published `weights`."""
    return tuple(_weights(name, weights).meta["categories"])


def default_input(name: str, weights: str | None, args: Mapping[str, Any]) -> InputSpec:
    """Return the input of the published evaluation of `weights`, or of torchvision's recommended ones."""
    from torchvision import models

    _check_name(name)
    entry = _weights(name, weights) if weights else models.get_model_weights(name).DEFAULT
    preset = entry.transforms()
    # without weights a vision transformer takes images of the usual size, whatever its best weights take
    usual = _IMAGE_SIZE if weights is None and name.startswith("vit_") else preset.crop_size[0]
    size = int(args.get("image_size", usual))
    return InputSpec((3, size, size), tuple(preset.mean), tuple(preset.std))


def _check_name(name: str) -> None:
    known = names()
    if name not in known:
        raise unknown_name("torchvision architecture", name, known)


def _check_arguments(name: str, args: Mapping[str, Any]) -> None:
    """Raise `InputError` for an argument that the network's class does not declare, or that would fetch weights."""
    from torchvision import models

    check_no_download(name, args)
    made = typing.get_type_hints(models.get_model_builder(name))["return"]
    known = [key for key, kind in inspect.signature(made).parameters.items() if kind.kind is not kind.VAR_KEYWORD]
    for key in args:
        if key not in known:
            raise unknown_name(f"argument of {name}", key, known)


def _weights(name: str, weights: str) -> Any:
    from torchvision import models

    _check_name(name)
    offered = models.get_model_weights(name)
    if weights not in offered.__members__:
        raise unknown_name(f"weights of {name}", weights, offered.__members__)
    return offered[weights]


def _first_line(error: Exception) -> str:
    """Return the reason of an error without the C++ trace that torch writes under it."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _written(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in args.items())
