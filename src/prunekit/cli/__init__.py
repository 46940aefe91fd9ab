"""The command line: a thin layer over the Python API. Torch is imported only by commands that need it."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command that `sys.argv` names and exit with its status."""
    try:
        from prunekit.cli.app import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # before a command could begin, or while its last lines were written
        sys.exit(130)
