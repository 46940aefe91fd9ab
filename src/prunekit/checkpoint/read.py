"""Read a network: recognise a source by its content, and return the network or raise one clear error."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from prunekit import models
from prunekit.checkpoint import foreign, sniff, ultralytics, weights
from prunekit.checkpoint.artefact import Header
from prunekit.checkpoint.trusted import load_trusted
from prunekit.errors import InputError, Noted
from prunekit.files import pickles
from prunekit.files.class_names import checked_class_names
from prunekit.models import timm_zoo
from prunekit.models.torchvision_zoo import check_no_download
from prunekit.programs import archive
from prunekit.spec import InputSpec, Origin, origin_of, remember, remember_classes

# Layers without weights lie between those with some, a few for each.
_MODULES_PER_TENSOR = 8

# Most numbers in an input that the caller has not confirmed, such as 3x1600x1600.
_LARGEST_INPUT = 1 << 23

# Most characters of an error message.
_LONGEST = 600


@dataclass(frozen=True)
class Request:
    """The caller's arguments for a file, and the folder that it lies in (None for a stream)."""

    name: str
    folder: Path | None
    arch: str | None
    arch_args: Mapping[str, Any] | None
    trust_pickle: bool
    key: str | None
    ignore_keys: Sequence[str]


def load(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    key: str | None = None,
    ignore_keys: Sequence[str] = (),
    input_spec: InputSpec | None = None,
    classes: Sequence[str] | None = None,
    map_location: str | torch.device = "cpu",
) -> nn.Module:
    """Load a network in eval mode that remembers its origin.

    Nothing in a file is executed, except with `trust_pickle`, or where a prunekit file's architecture is code and
    `arch` names that code.

    Args:
        source: A path, a binary stream, or the name of a network without a file (`torchvision:…`, `timm:…`,
            `prunekit:…`).
        arch: The architecture of a state dict; one that a single known network fits needs none, and a warning says
            which it is. Prunekit's own files and exported programs need none either.
        arch_args: Arguments of the architecture.
        trust_pickle: Allow the file to run code, as pickles of whole networks do.
        key: Which network of a checkpoint that holds several: the keys that lead to it, joined by dots, and perhaps a
            prefix of its names.
        ignore_keys: Patterns of keys of a state dict to leave out, such as `loss.*`.
        input_spec: Shape and normalisation of the input, in place of those that the file gives.
        classes: The names of a classifier's outputs, in their order, in place of those that the file gives.
        map_location: The device of the weights.

    Raises:
        InputError: The source cannot be read as a network.
    """
    reading = {"arch": arch, "arch_args": arch_args, "trust_pickle": trust_pickle, "key": key}
    model = as_stored(source, **reading, ignore_keys=ignore_keys)  # type: ignore[arg-type]
    if input_spec is not None:
        remember(model, replace(origin_of(model) or Origin(""), input=input_spec))
    else:
        _check_input(source, model)
    if classes is not None:
        remember_classes(model, checked_class_names(classes))
    return model.to(map_location)


def as_stored(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    key: str | None = None,
    ignore_keys: Sequence[str] = (),
) -> nn.Module:
    """Load as `load` does, but accept any input size that the file gives, for callers that set another."""
    if isinstance(source, str) and _is_name(source):
        _check_no_key(key, source)
        return models.build(source, arch_args).eval()
    return _read(source, arch, arch_args, trust_pickle, key, ignore_keys).eval()


def _read(
    source: str | os.PathLike[str] | BinaryIO,
    arch: str | None,
    arch_args: Mapping[str, Any] | None,
    trust_pickle: bool,
    key: str | None,
    ignore_keys: Sequence[str],
) -> nn.Module:
    stream, name = sniff.open_source(source)
    folder = Path(source).parent if isinstance(source, str | os.PathLike) else None
    with stream:
        try:
            kind = sniff.kind_of(stream, name)
            return _READERS[kind](stream, Request(name, folder, arch, arch_args, trust_pickle, key, ignore_keys))
        except InputError as error:
            hint = None if error.hint is None else _presentable(error.hint)
            raise InputError(_presentable(error.message), hint=hint) from error


def _check_input(source: str | os.PathLike[str] | BinaryIO, model: nn.Module) -> None:
    """Refuse an enormous input size from a file: inputs of that size are created, and all that follows from them."""
    origin = origin_of(model)
    if origin is not None and origin.input is not None and math.prod(origin.input.shape) > _LARGEST_INPUT:
        raise InputError(
            _presentable(f"{sniff.name_of(source)} gives an input of {'x'.join(map(str, origin.input.shape))}"),
            hint="if that is meant, say it: input_spec (--input-size)",
        )


def _presentable(message: str) -> str:
    """Return a message as one line for a terminal: names in a file may contain escape sequences and pages of text."""
    printable = "".join(character if character.isprintable() else "?" for character in message)
    return printable if len(printable) <= _LONGEST else printable[:_LONGEST] + "…"


def _is_name(source: str) -> bool:
    return source.startswith(("prunekit:", "torchvision:", "timm:")) and not Path(source).exists()


def _read_pickle(stream: BinaryIO, request: Request) -> nn.Module:
    if request.trust_pickle:
        code = request.arch if request.arch is not None and models.is_code(request.arch) else None
        with models.beside(request.folder, code):
            content = load_trusted(stream, request.name)
    else:
        content = pickles.load_tensors(stream, request.name)
    if isinstance(content, Mapping) and "prunekit" in content:
        _check_no_key(request.key, request.name)
        return _read_own(content, request)
    return _read_foreign(content, request)


def _read_foreign(content: Any, request: Request) -> nn.Module:
    """Return the one network in what a foreign training script saved."""
    if request.key is None and request.arch is None and ultralytics.is_checkpoint(content):
        return ultralytics.read(content)
    found = foreign.networks(content, request.name)
    request = _with_hyper_parameters(content, request)
    if request.key is not None:
        found = {request.key: foreign.at(found, request.key, request.name)}
    modules = {place: value for place, value in found.items() if isinstance(value, nn.Module)}
    if modules:
        return _adopt(foreign.only(modules, request.name, "networks"), request)
    return _read_state_dicts({place: value for place, value in found.items() if isinstance(value, Mapping)}, request)


def _check_no_key(key: str | None, name: str) -> None:
    if key is not None:
        raise InputError(f"{name} holds one network and no others", hint=f"leave key (--key) {key} out")


def _read_own(content: Mapping[str, Any], request: Request) -> nn.Module:
    """Build prunekit's own file: the architecture, then its present shape, then the weights as they were saved."""
    try:
        header = Header.from_text(content["prunekit"])
        arch, args = _own_architecture(header, request)
        state = content.get("state_dict")
        if not foreign.is_state_dict(state) or _shapes(state) != header.structure["parameters"]:
            raise InputError("its weights are not those that its header describes")
        weights.check_backed(state, "its state dict")
        model = _rebuilt(header, arch, args, state)
    except InputError as error:
        raise InputError(f"{request.name}: {error.message}", hint=error.hint) from error
    return remember(model, replace(header.origin, arch=arch, arch_args=args))


def _rebuilt(header: Header, arch: str, args: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    changed = _has_changed(header, arch)
    try:
        model = _shaped(weights.empty(arch, args, modules=_MODULES_PER_TENSOR * (len(state) + 32)), header, arch)
        weights.check_fit(model, state, f"its weights do not fit {arch}")
    except InputError as error:
        since = f"; the code of {arch} has changed since" if changed else ""
        raise InputError(error.message + since, hint=error.hint) from error
    if changed:
        warnings.warn(f"the code of {arch} is not the code that its weights were saved with", stacklevel=2)
    real = weights.on_cpu(model, arch, args)
    model = real if real is model else _shaped(real, header, arch)
    weights.fill(model, state)
    return model


def _has_changed(header: Header, arch: str) -> bool:
    """Return whether the code of `arch` differs from the code that the network was saved with."""
    path = models.source_file(arch) if models.is_code(arch) else None
    return path is not None and header.code is not None and header.code.get("sha256") not in models.source_digests(path)


def _shaped(model: nn.Module, header: Header, arch: str) -> nn.Module:
    """Return the fresh network in the shape that surgery had left."""
    from prunekit.surgery import structure

    if structure.describe(model) == header.structure:
        return model
    try:
        model = structure.conform(model, header.structure)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"its structure does not suit {arch}: {pickles.first_line(error)}") from error
    # a file may name attributes that are no shapes, such as methods
    if structure.describe(model) != header.structure:
        raise InputError(f"its structure does not suit {arch}")
    return model


def _own_architecture(header: Header, request: Request) -> tuple[str, Mapping[str, Any]]:
    """Return the architecture as stored, unless the caller names another; code named by a file never runs unasked."""
    stored = header.origin.arch
    args = header.origin.arch_args if request.arch_args is None else request.arch_args
    if stored.startswith("torchvision:"):
        check_no_download(stored.partition(":")[2], args)
    if stored.startswith("timm:"):
        timm_zoo.check_no_download(stored.partition(":")[2], args)
    if request.arch is None and models.is_code(stored) and not request.trust_pickle:
        raise InputError(
            f"its architecture is code, which is not run unasked: {stored}",
            hint=f"if you trust that code, name it: arch (--arch) {stored}",
        )
    return models.canonical(request.arch or stored), args


def _read_state_dicts(found: Mapping[str, Mapping[str, Tensor]], request: Request) -> nn.Module:
    found = foreign.without(found, request.ignore_keys, request.name)
    if request.arch is None:
        model, flags = weights.recognised(found, request.arch_args, request.name)
        warnings.warn(f"took {flags}: the keys and shapes of {request.name} fit", Noted, stacklevel=2)
    else:
        model = weights.from_state_dicts(found, models.canonical(request.arch), request.arch_args, request.name)
    origin = origin_of(model)
    if origin is None or origin.input is None:
        return model
    return remember(model, replace(origin, input=replace(origin.input, assumed=True)))


def _with_hyper_parameters(content: Any, request: Request) -> Request:
    """Return the request with the hyper-parameters of a checkpoint that the user's own code takes as its defaults.

    The caller's own arguments win.
    """
    if request.arch is None or not models.is_code(request.arch):
        return request
    stored = foreign.hyper_parameters(content)
    taken = {name: value for name, value in stored.items() if models.takes(request.arch, name)}
    return replace(request, arch_args={**taken, **(request.arch_args or {})})


def _read_safetensors(stream: BinaryIO, request: Request) -> nn.Module:
    try:
        state = safetensors.torch.load(stream.read())
    except Exception as error:  # its parser raises several unrelated types
        raise InputError(f"{request.name} is a damaged .safetensors: {pickles.first_line(error)}") from error
    return _read_foreign(state, request)


def _read_exported(stream: BinaryIO, request: Request) -> nn.Module:
    _check_no_key(request.key, request.name)
    program, about = archive.read(stream, request.name)
    shape = [size for size in program.sizes[1:] if size is not None]
    known = len(shape) == len(program.sizes) - 1
    origin = Origin("", input=InputSpec(tuple(shape), assumed=True) if known else None)
    try:
        if about.get("input") is not None:
            origin = replace(origin, input=InputSpec.from_json(about["input"]))
        origin = replace(origin, classes=tuple(map(str, about.get("classes", ()))))
        origin = replace(origin, history=tuple(dict(step) for step in about.get("history", ())))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{request.name} is damaged: what it says about its input is not readable: {error}") from error
    return remember(program, origin)


def _adopt(model: nn.Module, request: Request) -> nn.Module:
    """Return the module of a trusted pickle without wrappers; its origin is the architecture named by the caller."""
    while isinstance(model, nn.DataParallel):
        model = model.module
    if request.arch is not None:
        arch, args = models.canonical(request.arch), dict(request.arch_args or {})
        remember(model, Origin(arch, args, models.default_input(arch, args)))
    return model


def _shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in state.items()}


_READERS: dict[str, Callable[[BinaryIO, Request], nn.Module]] = {
    "zip": _read_pickle,
    "pickle": _read_pickle,
    "safetensors": _read_safetensors,
    "pt2": _read_exported,
}
