"""Writing files and folders atomically: either whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from prunekit.errors import InputError


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, force: bool = False) -> None:
    """Call `write` with a temporary file beside `path`, flush it to the disk, and rename it to `path`.

    When anything fails, the old file is untouched and the temporary one is gone. A path that is no regular file (a
    pipe, a terminal) is written to directly.

    Raises:
        InputError: The file exists and `force` is off, or nothing can be written there.
    """
    path = Path(path)
    check_target(path, force)
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                write(stream)
        else:
            _replace(Path(os.path.realpath(path)), write, force)  # unlike resolve(), it bears links in a circle
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def atomic_folder(
    path: str | os.PathLike[str], files: Mapping[str, bytes], replaces: re.Pattern[str] | None = None
) -> None:
    """Write `files`, by their names, into a new folder `path` that appears whole or not at all.

    A folder that exists is replaced where every file in it has a name that `replaces` allows.

    Raises:
        InputError: The folder exists and may not be replaced, or nothing can be written there.
    """
    path = Path(path)
    check_folder(path, replaces)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            temporary.mkdir()
            for name, content in files.items():
                with (temporary / name).open("xb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            if path.exists():
                old = path.rename(path.with_name(f"{temporary.name}.old"))
                temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def check_folder(path: Path, replaces: re.Pattern[str] | None) -> None:
    """Raise `InputError` where the folder `path` cannot be made or may not be replaced; see `atomic_folder`."""
    try:
        if path.is_dir() and replaces is not None:
            others = [entry.name for entry in path.iterdir() if not replaces.fullmatch(entry.name) or entry.is_dir()]
            if others:
                raise InputError(f"{path} holds {min(others)}, which is not replaced", hint="name another folder")
        elif path.exists() or path.is_symlink():
            hint = None if replaces else "force (--force) replaces what an earlier export has written"
            raise InputError(f"{path} exists already", hint=hint or "name a folder that does not")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(path)!r}: {error}") from error


def check_target(path: Path, force: bool) -> None:
    """Raise `InputError` where `path` is a folder, its parent is missing, or it is a file and `force` is off."""
    try:
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder", hint="name a file in it")
        if path.is_file() and not force:
            raise InputError(f"{path} exists already", hint="force (--force) overwrites it")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(path)!r}: {error}") from error


def _replace(path: Path, write: Callable[[BinaryIO], object], force: bool) -> None:
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o7777)
        if force or not _linked(temporary, path):
            temporary.replace(path)
    finally:
        # already gone after the rename; otherwise something failed, and that error is the one to report
        with contextlib.suppress(OSError):
            temporary.unlink()


def _linked(temporary: Path, path: Path) -> bool:
    """Hard-link the finished file to `path`; return False where the file system has no links.

    Raises:
        InputError: Another process has created `path` in the meantime.
    """
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise InputError(f"{path} exists already", hint="force (--force) overwrites it") from None
    except OSError:
        return False
    return True
