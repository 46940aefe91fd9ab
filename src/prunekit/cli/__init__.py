"""The command line: a thin face on the Python API. Torch is imported only by the command that needs it."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """The `prunekit` program: run the command that `sys.argv` names and leave with its exit status."""
    try:
        from prunekit.cli.app import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # before a command could begin, or while the last lines of one were written
        sys.exit(130)
