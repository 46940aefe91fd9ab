"""A log: what a command says to people, and the events of its work, as lines with their times."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from prunekit.errors import InputError
from prunekit.report.text import printable

# Most characters that are looked at to tell text from a model file.
_LOOKED_AT = 4096


class Log:
    """A text file that grows by lines which begin with the time, in ISO 8601 with the offset from UTC.

    Args:
        path: The file; created where it is missing.
        title: What the lines are about, as the first of them.

    Raises:
        InputError: It cannot be written, or is no text file.
    """

    def __init__(self, path: str, title: str) -> None:
        self._path = Path(path)
        if path == "-":
            raise InputError("--log - is no file", hint="what it would hold is on standard error already")
        if self._path.is_file() and b"\0" in self._beginning():
            raise InputError(f"{path} is no text file, so nothing is added to it (--log)")
        self.write(title)

    def write(self, text: str) -> None:
        """Add lines; raise `InputError` where the disk is full or the like."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        lines = (f"{now} {printable(line)}".rstrip() + "\n" for line in text.strip("\n").splitlines())
        try:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))
        except OSError as error:
            raise InputError(f"cannot write the log {self._path}: {error.strerror}") from error

    def _beginning(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                return file.read(_LOOKED_AT)
        except OSError as error:
            raise InputError(f"cannot read the log {self._path}: {error.strerror}") from error
