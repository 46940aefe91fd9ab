"""Reading pickles without running them, and listing what they would have run."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch

from prunekit.errors import InputError
from prunekit.files import pickle_scan
from prunekit.files.archive import Archive

# What torch itself reads under `weights_only=True`, as far as state dicts need it.
_HARMLESS = re.compile(
    r"torch\.(\w*Storage|_utils\._rebuild_\w+|Size|device|\w*float\w*|\w*int\d+|bool|half|bfloat16|complex\w*)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\.nn\.parameter\.(Parameter|Buffer)"
    r"|torch\.serialization\._get_layout|torch\.per_\w+"
    r"|collections\.(OrderedDict|Counter|defaultdict)|(builtins|__builtin__)\.(bytearray|complex|set)|_codecs\.encode"
)

# Pickles of a legacy file: magic number, protocol, system information, the object itself, the keys of its storages.
_LEGACY_PICKLES = 5

# Beginning of files that torch wrote before its zip format; other pickles were written without torch.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_HINT = "only if you trust its author: trust_pickle (--trust-pickle); a state dict needs no trust"


def load_tensors(stream: BinaryIO, name: str) -> Any:
    """Unpickle with `weights_only=True`: tensors and plain containers, whatever else the file asks for.

    Raises:
        InputError: The file is damaged, or asks for more; the message gives the names that it wanted.
    """
    try:
        _check_claims(stream, name)
        return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # the parsers raise anything on damaged bytes
        wanted = [found for found in sorted(globals_in(stream)) if not _HARMLESS.fullmatch(found)]
        if not wanted and isinstance(error, InputError):
            raise
        if not wanted:
            raise InputError(f"{name} is damaged or truncated: {first_line(error)}") from error
        listed = ", ".join(wanted[:5]) + (f" and {len(wanted) - 5} more" if len(wanted) > 5 else "")
        raise InputError(
            f"{name} is refused: it is a pickle that asks for code on loading, namely {listed}", hint=_HINT
        ) from error


def _check_claims(stream: BinaryIO, name: str) -> None:
    """Raise `InputError` where loading would allocate more than the file holds; otherwise rewind the stream."""
    stream.seek(0)
    if stream.read(2) == b"PK":
        archive = Archive(stream, name)
        pickle_scan.check(io.BytesIO(archive.read("data.pkl")), name, archive.sizes_below("data/"))
    else:
        stream.seek(0)
        pickle_scan.check(stream, name, None, pickles=_LEGACY_PICKLES)
    stream.seek(0)


def globals_in(stream: BinaryIO) -> set[str]:
    """Return the dotted names that a torch file's pickles would import, found by reading opcodes; nothing is run."""
    found: set[str] = set()
    try:
        for data in _pickles(stream):
            found.update(_globals(data))
    except Exception:  # opcodes end where the damage begins; what came before is still worth telling
        return found
    return found


def _pickles(stream: BinaryIO) -> Iterator[io.BytesIO]:
    """Yield the pickle inside a zip archive, or the several in a row of torch's legacy format."""
    stream.seek(0)
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            for member in archive.namelist():
                if member.endswith(".pkl"):
                    yield io.BytesIO(archive.read(member))
        return
    stream.seek(0)
    data = io.BytesIO(stream.read())
    for _ in range(_LEGACY_PICKLES - 1):
        yield data


def _globals(data: io.BytesIO) -> Iterator[str]:
    """Follow strings through stack and memo, as far as naming globals needs it."""
    pushed: list[str | None] = []
    memo: dict[int, str | None] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
            pushed.append(None)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(part or "?" for part in pushed[-2:])
            pushed.append(None)
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = pushed[-1] if pushed else None
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = pushed[-1] if pushed else None
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            pushed.append(memo.get(int(argument or 0)))
        elif "UNICODE" in opcode.name or "STRING" in opcode.name:
            pushed.append(str(argument))
        elif opcode.stack_after:
            pushed.append(None)


def first_line(error: BaseException) -> str:
    """Return one line of the message of an exception that a third party's parser raised."""
    # torch's own messages advise weights_only=False, which is the last thing to suggest here
    if isinstance(error, pickle.UnpicklingError):
        return "no valid pickle of tensors"
    return next(iter(str(error).splitlines()), "") or type(error).__name__
