"""Tell the kind of a file from its content, and explain what a file is that holds no network."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

from prunekit.errors import InputError
from prunekit.exporting.onnx_files import is_onnx
from prunekit.files.archive import Archive

EXPECTED = "expected a prunekit file, a state dict, .safetensors or .pt2"

# First bytes of files that people pass by mistake.
_STRANGERS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"7z\xbc\xaf", "a 7-zip archive"),
    (b"\x89HDF", "an HDF5 file, as Keras writes"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a compiled program"),
    (b"<", "a web page or XML; a download may have failed"),
    (b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` fetches the file"),
)
_TAR_MAGIC = slice(257, 262)


def open_source(source: str | os.PathLike[str] | BinaryIO) -> tuple[BinaryIO, str]:
    """Open a seekable stream of the source, which the caller closes; return it with a name for messages.

    Raises:
        InputError: The path is missing, a folder, a device, or not readable.
    """
    if not isinstance(source, str | os.PathLike):
        return io.BytesIO(source.read()), name_of(source)
    name = name_of(source)
    try:
        mode = Path(name).stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{name} is a folder, {EXPECTED}")
        if stat.S_ISREG(mode):
            return Path(name).open("rb"), name
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            return io.BytesIO(Path(name).read_bytes()), name
    except FileNotFoundError:
        raise InputError(f"there is no file {name}", hint=_HINT_NAMES) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {name!r}: {error}") from error
    raise InputError(f"{name} is a device, {EXPECTED}")


def name_of(source: str | os.PathLike[str] | BinaryIO) -> str:
    """Return the name of a source in messages."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return str(getattr(source, "name", "the input"))


_HINT_NAMES = "a network without a file is prunekit:NAME, torchvision:NAME or timm:NAME"


def kind_of(stream: BinaryIO, name: str) -> str:
    """Return `zip`, `pt2`, `pickle` or `safetensors`, from the content alone; the stream is left at its beginning.

    Raises:
        InputError: The file is something else, which the message names.
    """
    stream.seek(0)
    head = stream.read(512)
    stream.seek(0)
    if not head:
        raise InputError(f"{name} is empty, {EXPECTED}")
    if head.startswith(b"PK"):
        return _zip_kind(stream, name)
    if head[8:9] == b"{":
        return "safetensors"
    if head[_TAR_MAGIC] == b"ustar":
        raise InputError(f"{name} is a tar archive, {EXPECTED}")
    for magic, what in _STRANGERS:
        if head.startswith(magic):
            raise InputError(f"{name} is {what}; {EXPECTED}")
    if is_onnx(head):
        raise InputError(
            f"{name} is an ONNX file; {EXPECTED}",
            hint="prunekit eval and compare run it; what changes a network needs the file that it was exported from",
        )
    # every pickle since protocol 2 begins like this
    if head.startswith(b"\x80") and head[1:2] <= b"\x05":
        return "pickle"
    raise InputError(f"{name} is not a model: it begins with {head[:8]!r}; {EXPECTED}")


def _zip_kind(stream: BinaryIO, name: str) -> str:
    archive = Archive(stream, name)
    members = archive.members
    stream.seek(0)
    if "archive_format" in members and any(member.startswith("models/") for member in members):
        return "pt2"
    if "serialized_exported_program.json" in members or "serialized_exported_program.json" in members.values():
        raise InputError(
            f"{name} is an exported program of an old torch", hint="export it again with torch 2.8 or later"
        )
    if "constants.pkl" in members:
        raise InputError(f"{name} is a TorchScript program, {EXPECTED}", hint="save the state dict of its model")
    if "data.pkl" not in members:
        shown = ", ".join(list(members)[:3]) or "nothing"
        raise InputError(f"{name} is a zip archive with {shown}; {EXPECTED}")
    archive.check()
    stream.seek(0)
    return "zip"
