"""Architectures that are files of the user's own, remembered for the checkpoints that they were named for.

A checkpoint of one's own class needs its code, and code runs only where somebody has named it. Whoever has named a file
once (`--arch net.py:Net`) has looked at it then; so the name may be left out from there on, while neither the
checkpoint nor the code has changed since, by the SHA-256 of both (the code with the neighbours that it imports), as
direnv allows a folder's settings. What is remembered is one small file for each checkpoint, in the user's state folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prunekit.errors import InputError, Noted
from prunekit.files.writing import atomic_write


@dataclass(frozen=True)
class Named:
    """What somebody has named for a checkpoint: the code, its arguments, and how both files were then."""

    checkpoint: str
    checkpoint_sha256: str
    arch: str
    arch_args: str | None
    code_sha256: str


def folder() -> Path:
    """Return the folder: `$PRUNEKIT_STATE`, or `prunekit` in `$XDG_STATE_HOME`, by default `~/.local/state`."""
    own = os.environ.get("PRUNEKIT_STATE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "prunekit"


def remember(checkpoint: str, arch: str, arch_args: str | None) -> None:
    """Remember that the user has named the code `arch` for this checkpoint; where it is no code in a file, forget it.

    A state folder that cannot be written to costs typing the name again, no more.
    """
    code, path = _code_sha256(arch), _real(checkpoint)
    if not path.is_file():
        return
    with contextlib.suppress(OSError, InputError):
        where = _file_of(path)
        if code is None:
            where.unlink(missing_ok=True)
            return
        entry = Named(str(path), _sha256(path), _absolute(arch), arch_args, code)
        where.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = json.dumps(asdict(entry), sort_keys=True).encode()
        atomic_write(where, lambda stream: stream.write(content), force=True)


def recall(checkpoint: str) -> Named | None:
    """Return what was named for this checkpoint; None where nothing was, or, with a warning, for another content.

    Raises:
        InputError: The code has changed since.
    """
    path = _real(checkpoint)
    entry = _read(_file_of(path))
    if entry is None or not path.is_file():
        return None
    arch = _from_here(entry.arch)
    if _sha256(path) != entry.checkpoint_sha256:
        text = f"{checkpoint} has changed since {arch} was named for it: where it needs that code, name it again"
        warnings.warn(text, Noted, stacklevel=2)
        return None
    if _code_sha256(entry.arch) != entry.code_sha256:
        raise InputError(
            f"the code {arch} has changed since it was named for {checkpoint}",
            hint=f"if you trust it as it is now, name it again: --arch {arch}",
        )
    return replace(entry, arch=arch)


def everything() -> list[Named]:
    """Return all that is remembered, by the paths of the checkpoints."""
    found = (_read(path) for path in (folder() / "named-code").glob("*.json"))
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.checkpoint)


def forget(checkpoint: str) -> list[Named]:
    """Forget what was named for a checkpoint, or with `all` everything; return what that was.

    Raises:
        InputError: Nothing is remembered of it.
    """
    path = str(_real(checkpoint))
    gone = [entry for entry in everything() if checkpoint == "all" or entry.checkpoint == path]
    if not gone and checkpoint != "all":
        raise InputError(f"nothing is remembered of {checkpoint}", hint="prunekit archs --remembered lists what is")
    for entry in gone:
        _file_of(Path(entry.checkpoint)).unlink(missing_ok=True)
    return gone


def _read(path: Path) -> Named | None:
    try:
        return Named(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none, or damaged: the user names it again
        return None


def _real(path: str) -> Path:
    return Path(os.path.realpath(path))  # unlike resolve(), it bears links in a circle


def _file_of(checkpoint: Path) -> Path:
    return folder() / "named-code" / f"{hashlib.sha256(os.fsencode(checkpoint)).hexdigest()[:32]}.json"


def _absolute(arch: str) -> str:
    """Return `path/to/file.py:callable` with the whole path: it is to be found from any folder."""
    where, _, name = arch.rpartition(":")
    return f"{_real(where)}:{name}"


def _from_here(arch: str) -> str:
    """Return it as one would name it in the working folder, where the file is in there."""
    where, _, name = arch.rpartition(":")
    path, here = Path(where), _real(".")
    return f"{path.relative_to(here) if path.is_relative_to(here) else path}:{name}"


def _code_sha256(arch: str) -> str | None:
    """Return the hash of the code in the file that `arch` names, neighbours included; None where there is none."""
    from prunekit.models.sources import source_digests

    path = Path(arch.rpartition(":")[0])
    return source_digests(path)[0] if path.suffix == ".py" and path.is_file() else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for part in _parts(stream):
            digest.update(part)
    return digest.hexdigest()


def _parts(stream: Any) -> Iterator[bytes]:
    while part := stream.read(1 << 20):
        yield part
