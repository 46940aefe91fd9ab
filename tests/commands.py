"""The commands of the program, those of groups among them, and how tests call them."""

from __future__ import annotations

import json
from typing import Any

import pytest

import schemas
from prunekit.cli.app import root_command, run

Capture = pytest.CaptureFixture[str]


def leaves() -> dict[str, Any]:
    """Every command by what is typed for it."""
    found: dict[str, Any] = {}
    root = root_command()
    for name in root.list_commands(None):
        command = root.get_command(None, name)
        own = command.list_commands(None) if hasattr(command, "list_commands") else []
        found |= {f"{name} {one}": command.get_command(None, one) for one in own} or {name: command}
    return found


def call(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command."""
    capsys.readouterr()
    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def document(capsys: Capture, *arguments: object) -> dict[str, Any]:
    """The one JSON document of a command that must succeed, checked against its schema."""
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    schemas.check(found)
    return found
