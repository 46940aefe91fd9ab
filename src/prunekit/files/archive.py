"""Zip archives that are checked before anything in them is unpacked."""

from __future__ import annotations

import zipfile
from typing import BinaryIO

from prunekit.errors import InputError

# Weights hardly compress: an archive that unpacks to more than this many times its size holds no network.
_MOST_EXPANSION = 10


class Archive:
    """The members of a zip archive under its single top folder, as torch writes them."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        """Open an archive.

        Args:
            stream: The archive, seekable.
            name: The name of the file, for error messages.

        Raises:
            InputError: The archive is damaged, ambiguous, or made to unpack to far more than its size.
        """
        self.name = name
        stream.seek(0)
        try:
            self._zip = zipfile.ZipFile(stream)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise InputError(f"{name} is a damaged or truncated zip archive: {error}") from error
        self.size = stream.seek(0, 2)
        self._check_unambiguous()
        unpacked = sum(member.file_size for member in self._zip.infolist())
        if unpacked > _MOST_EXPANSION * self.size:
            raise InputError(f"{name} is refused: its {self.size} bytes would unpack to {unpacked}")
        self.members = {_below_top(full): full for full in self._zip.namelist()}
        if len(self.members) != len(self._zip.namelist()):
            raise InputError(f"{name} is refused: two of its members have one name")

    def read(self, member: str) -> bytes:
        """Return the content of a member, checked against its checksum; raise `InputError` where there is none."""
        if member not in self.members:
            raise InputError(f"{self.name} is incomplete: it has no {member}")
        return self._zip.read(self.members[member])

    def sizes_below(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of each member of `folder`, by its name there."""
        below = {member: full for member, full in self.members.items() if member.startswith(folder)}
        return {member.removeprefix(folder): self._zip.getinfo(full).file_size for member, full in below.items()}

    def _check_unambiguous(self) -> None:
        """Refuse bytes before or after the archive, so that any reader of zip archives finds the same members in it."""
        first = min((member.header_offset for member in self._zip.infolist()), default=0)
        if first or self._zip.comment:
            raise InputError(f"{self.name} is refused: it is a zip archive among other bytes")

    def check(self) -> None:
        """Raise `InputError` unless the content of every member matches its checksum."""
        try:
            broken = self._zip.testzip()
        except Exception as error:  # the parsers raise anything on damaged bytes
            raise InputError(f"{self.name} is damaged: {error}") from error
        if broken is not None:
            raise InputError(f"{self.name} is damaged: {broken} does not have its checksum")


def _below_top(full: str) -> str:
    return full.partition("/")[2] or full
