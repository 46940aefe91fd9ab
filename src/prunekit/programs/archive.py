"""Read a `.pt2` archive: its JSON and its raw weights. Nothing in it is unpickled but plain tensors."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from prunekit.errors import InputError
from prunekit.files.archive import Archive
from prunekit.files.pickles import first_line, load_tensors
from prunekit.programs import ops
from prunekit.programs.judge import ExcessError
from prunekit.programs.program import ExportedProgram

_SCHEMA = 8

# Tied weights are stored once in an archive, and a constant may repeat a number by its strides.
_MOST_SHARING = 8

# The notes in prunekit's own exports about their network; see `prunekit.exporting.formats.about`.
_ABOUT = "extra/prunekit.json"


def read(stream: BinaryIO, name: str) -> tuple[ExportedProgram, dict[str, Any]]:
    """Return the program in the archive, as a module in eval mode, and the notes in the file (often none).

    Raises:
        InputError: The archive is damaged, has compiled or pickled code, or uses operators that are not torch's own.
    """
    archive = Archive(stream, name)
    foreign = [member for member in archive.members if member.startswith("data/aotinductor/")]
    if foreign:
        raise InputError(f"{name} is refused: it holds compiled code ({foreign[0]}), expected an exported program")
    try:
        about = json.loads(archive.read(_ABOUT)) if _ABOUT in archive.members else {}
        return _program(archive).eval(), dict(about)
    except ExcessError as error:
        raise InputError(f"{name} is refused: {error.message}") from None
    except InputError:
        raise
    except ops.UnsupportedError as error:
        raise InputError(
            f"{name} is refused: its program uses {error}, which is none of those that are run from files",
            hint="the checkpoint with its architecture (--arch) has no such limit",
        ) from None
    except Exception as error:  # JSON with arbitrary content reaches torch here
        raise InputError(f"{name} is damaged: {type(error).__name__}: {first_line(error)}") from error


def _program(archive: Archive) -> ExportedProgram:
    model = next(member for member in archive.members if _is_model(member))
    program = json.loads(archive.read(model))
    major = program["schema_version"]["major"]
    if major != _SCHEMA:
        raise InputError(f"{archive.name} has torch.export's schema {major}, expected {_SCHEMA}")
    stem = model.removeprefix("models/").removesuffix(".json")
    tensors = _tensors(archive, "data/weights/", stem, "_weights_config.json")
    tensors |= _tensors(archive, "data/constants/", stem, "_constants_config.json")
    _check_held(archive, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    graph_module = program["graph_module"]
    return ExportedProgram(graph_module["graph"], graph_module["signature"], tensors)


def _check_held(archive: Archive, claimed: int) -> None:
    if claimed > _MOST_SHARING * archive.size:
        raise InputError(f"{archive.name} is refused: its weights are {claimed} bytes, in an archive of {archive.size}")


def _is_model(member: str) -> bool:
    return member.startswith("models/") and member.endswith(".json")


def _tensors(archive: Archive, folder: str, stem: str, config: str) -> dict[str, Tensor]:
    """Return weights or constants: raw bytes with a JSON description, or a pickle of tensors in older files."""
    legacy = f"{folder}{stem}.pt"
    if legacy in archive.members:
        return dict(load_tensors(io.BytesIO(archive.read(legacy)), f"{archive.name}: {legacy}"))
    described = json.loads(archive.read(f"{folder}{stem}{config}"))["config"]
    sizes = archive.sizes_below(folder)
    _check_held(archive, sum(sizes.get(entry["path_name"], 0) for entry in described.values()))
    return {key: _tensor(archive, folder, entry) for key, entry in described.items()}


def _tensor(archive: Archive, folder: str, entry: Mapping[str, Any]) -> Tensor:
    path = entry["path_name"]
    content = archive.read(folder + path)
    if entry["use_pickle"]:
        tensor = load_tensors(io.BytesIO(content), f"{archive.name}: {path}")
        if not isinstance(tensor, Tensor):
            raise InputError(f"{archive.name}: {path} is {type(tensor).__name__}, expected a tensor")
    else:
        tensor = _raw(content, entry["tensor_meta"])
    trainable = tensor.is_floating_point() and bool((entry["tensor_meta"] or {}).get("requires_grad"))
    return nn.Parameter(tensor, requires_grad=trainable) if entry["is_param"] else tensor


def _raw(content: bytes, meta: Mapping[str, Any]) -> Tensor:
    sizes = [size["as_int"] for size in meta["sizes"]]
    dtype = ops.dtype(meta["dtype"])
    if not content:
        # an empty tensor needs no bytes, any other does
        return torch.empty(0, dtype=dtype).view(sizes)
    flat = torch.frombuffer(bytearray(content), dtype=dtype)
    return flat.as_strided(sizes, [step["as_int"] for step in meta["strides"]], meta["storage_offset"]["as_int"])
