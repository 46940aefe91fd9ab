"""The commands of the program, those of groups among them."""

from __future__ import annotations

from typing import Any

from prunekit.cli.app import root_command


def leaves() -> dict[str, Any]:
    """Every command by what is typed for it."""
    found: dict[str, Any] = {}
    root = root_command()
    for name in root.list_commands(None):
        command = root.get_command(None, name)
        own = command.list_commands(None) if hasattr(command, "list_commands") else []
        found |= {f"{name} {one}": command.get_command(None, one) for one in own} or {name: command}
    return found
