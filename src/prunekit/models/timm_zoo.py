"""timm's networks by name, with random weights: its code is a library's, and runs as torchvision's does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from prunekit.errors import InputError, unknown_name
from prunekit.spec import InputSpec

# Beginnings of the arguments with which timm would fetch or read weights.
_FETCHING = ("pretrained", "checkpoint", "cache_dir", "hf", "model_name")


def build(name: str, args: Mapping[str, Any]) -> nn.Module:
    """Build the network with random weights.

    Raises:
        InputError: timm is missing, has no network of that name, or the arguments do not suit.
    """
    timm = _timm()
    check_no_download(name, args)
    _check_name(name)
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **args)
    except Exception as error:  # its networks raise anything for arguments that they cannot be built with
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"timm's {name} cannot be built with {dict(args)}: {reason}") from error
    return model


def check_no_download(name: str, args: Mapping[str, Any]) -> None:
    """Raise `InputError` for an argument that would fetch or read weights; imports nothing."""
    if any(key.startswith(_FETCHING) for key in args):
        hint = f"bring the weights as a file: prunekit inspect weights.safetensors --arch timm:{name}"
        raise InputError("weights are no argument of an architecture", hint=hint)


def default_input(name: str, args: Mapping[str, Any]) -> InputSpec | None:
    """Return the input that timm has noted for the network."""
    _check_name(name)
    noted = _timm().get_pretrained_cfg(name)
    if noted is None:
        return None
    channels, *sides = noted.input_size
    size = args.get("img_size")
    if size is not None:
        sides = [size, size] if isinstance(size, int) else list(size)
    channels = args.get("in_chans", channels)
    usual = channels == len(noted.mean)  # timm's mean and std are those of images with three channels
    return InputSpec((channels, *sides), tuple(noted.mean) if usual else (), tuple(noted.std) if usual else ())


def _check_name(name: str) -> None:
    timm = _timm()
    if not timm.is_model(name):
        raise unknown_name("architecture of timm", name, timm.list_models())


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError("timm is not installed", hint="pip install timm") from error
    return timm
