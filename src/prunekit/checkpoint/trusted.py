"""Pickles that the user trusts: they may run any code."""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO

import torch

from prunekit import models
from prunekit.errors import InputError
from prunekit.files.pickles import LEGACY_MAGIC, first_line


def load_trusted(stream: BinaryIO, name: str) -> Any:
    """Unpickle anything that the file holds, which runs the code that it names."""
    start = stream.read(len(LEGACY_MAGIC))
    stream.seek(0)
    try:
        if start.startswith((LEGACY_MAGIC, b"PK")):
            return torch.load(stream, map_location="cpu", weights_only=False)
        return pickle.load(stream)
    except (Exception, SystemExit) as error:  # foreign code may raise anything
        what = f"{name} cannot be unpickled: {type(error).__name__}: {first_line(error)}"
        raise InputError(what, hint=models.missing_code(error)) from error
