"""Architectures that are the user's own code: `path/to/file.py:callable` and `package.module:callable`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from prunekit.errors import InputError, unknown_name


def build(arch: str, args: Mapping[str, Any]) -> nn.Module:
    """Import the code that `arch` names, which runs it, and call the callable with `args`.

    Raises `InputError` when the code is missing, fails, or returns no `nn.Module`.
    """
    make = _callable(arch)
    try:
        model = make(**args)
    except Exception as error:  # whatever somebody else's code raises
        raise InputError(f"{arch} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{arch} returned {type(model).__name__}, expected an nn.Module")
    return model


def accepts(arch: str, argument: str) -> bool:
    """Whether the callable takes a keyword argument of this name."""
    parameters = inspect.signature(_callable(arch)).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def source_file(arch: str) -> Path | None:
    """The file of a `path/to/file.py:callable`; None for a module's."""
    where = arch.rpartition(":")[0]
    return Path(where) if where.endswith(".py") else None


def _callable(arch: str) -> Callable[..., Any]:
    where, _, name = arch.rpartition(":")
    path = source_file(arch)
    module = _import_file(path) if path else _import_module(where)
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"callable in {where}", name, public)
    return found


def _import_file(path: Path) -> ModuleType:
    """The file as a module; the same content of the same file is run once in a process."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the architecture's code: {path}: {error.strerror}") from error
    identity = hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:16]
    name = f"prunekit_user_{identity}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses, typing and pickling look a class's module up by its name
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"importing {path} failed: {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InputError(f"importing {name} failed: {type(error).__name__}: {error}") from error
