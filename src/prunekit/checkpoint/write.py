"""Write a network: the bytes of its artefact, and files that are either whole or not there."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from prunekit import models
from prunekit.checkpoint import ultralytics
from prunekit.checkpoint.artefact import Header, code_of
from prunekit.errors import InputError
from prunekit.files.class_names import checked_class_names
from prunekit.files.writing import atomic_write, check_target
from prunekit.spec import Origin, origin_of


def save(
    model: nn.Module,
    target: str | os.PathLike[str] | BinaryIO,
    *,
    force: bool = False,
    arch: str | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write the whole network: architecture, shape, history and weights, so that `load` needs nothing else.

    Two saves of one network give identical bytes, wherever they go.

    Args:
        model: The network.
        target: A path or a binary stream.
        force: Overwrite a file that exists.
        arch: The architecture of a network that does not remember its origin.
        classes: The names of a classifier's outputs, in their order; by default those that the network remembers.

    Raises:
        InputError: The network has no origin, the file exists and `force` is off, or nothing can be written there.

    Examples:
        >>> import prunekit as pk
        >>> small, _ = pk.slim(pk.load("prunekit:vgg_digits"), ratio=0.5)
        >>> pk.save(small, "small.pt")
        >>> pk.evaluate(pk.load("small.pt")).params == pk.evaluate(small).params
        True
    """
    if isinstance(target, str | os.PathLike):
        path = Path(target)
        check_target(path, force)
        content = to_bytes(model, arch, classes)
        atomic_write(path, lambda stream: stream.write(content), force=force)
    else:
        target.write(to_bytes(model, arch, classes))


def save_weights(model: nn.Module, path: Path, *, force: bool = False) -> None:
    """Write the state dict alone: as `.safetensors` by that suffix, else as `torch.save` does.

    Args:
        model: Any network but an exported program, which has no names of its own for its weights.
        path: The file to write.
        force: Overwrite an existing file.

    Raises:
        InputError: The file exists, or the network has no state dict of tensors.
    """
    from prunekit.programs.program import ExportedProgram

    if isinstance(model, ExportedProgram):
        raise InputError("an exported program has no state dict that its architecture could load")
    check_target(path, force)
    state = _own_tensors(model)

    def write(stream: BinaryIO) -> None:
        if path.suffix.lower() == ".safetensors":
            stream.write(safetensors.torch.save(state))
        else:
            torch.save(state, stream)

    atomic_write(path, write, force=force)


def to_bytes(model: nn.Module, arch: str | None = None, classes: Sequence[str] | None = None) -> bytes:
    """Return the artefact that `save` writes; an exported program stays one."""
    from prunekit.exporting import reexport
    from prunekit.programs.program import ExportedProgram
    from prunekit.surgery import structure

    origin = origin_of(model) or Origin("")
    if classes is not None:
        origin = replace(origin, classes=checked_class_names(classes))
    if isinstance(model, ExportedProgram):
        return reexport.to_bytes(model, origin)
    if arch is not None:
        origin = replace(origin, arch=models.canonical(arch))
    if not origin.arch and ultralytics.is_network(model):
        return ultralytics.to_bytes(model, origin)
    if not origin.arch:
        raise InputError(
            "the network does not say which architecture it is",
            hint="arch (--arch) names it: a bundled one, torchvision's, or path/to/file.py:callable",
        )
    header = Header(origin, structure.describe(model), code_of(origin.arch))
    content = {"prunekit": header.to_text(), "state_dict": _own_tensors(model)}
    # through memory, because torch names the archive's top folder after the file it writes to
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict on the CPU, each tensor with a storage of its own, no larger than itself."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(f"'{name}' of the network is {type(value).__name__}; only tensors can be saved")
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors
