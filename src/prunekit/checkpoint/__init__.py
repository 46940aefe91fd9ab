"""The safe, self-describing artefact, and readers of foreign checkpoints."""

from __future__ import annotations

from prunekit.checkpoint.read import load
from prunekit.checkpoint.write import save
from prunekit.files.writing import atomic_write

__all__ = ["atomic_write", "load", "save"]
