"""Code that was named for a checkpoint is found again, and never runs once it has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import schemas
from prunekit.cli import named_code
from prunekit.cli.app import run

CODE = """
from torch import nn
def Net(width=8):
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code, and a checkpoint for which it was named in `slim`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    size = ["--input-size", "1x8x8"]
    assert run(["train", "--arch", "net.py:Net", "--data", "digits", "--epochs", "1", *size, "-o", "net.pt"]) == 0
    assert run(["slim", "net.pt", "--arch", "net.py:Net", "--ratio", ".5", "-o", "small.pt"]) == 0
    return tmp_path


def test_the_code_is_named_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["inspect", "net.pt"]) == 0
    assert "took --arch net.py:Net, which was named for net.pt before" in capsys.readouterr().err
    assert run(["merge", "small.pt", "--ratio", ".5", "-o", "merged.pt"]) == 0  # what was written of it, too
    assert run(["inspect", "merged.pt"]) == 0
    del folder


def test_it_is_found_from_another_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert run(["inspect", "../small.pt"]) == 0


def test_changed_code_does_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "net.py").write_text(CODE + "\nopen('ran', 'w')\n")
    assert run(["inspect", "net.pt"]) == 2
    told = capsys.readouterr().err
    assert "net.py:Net has changed since it was named for net.pt" in told
    assert "--arch net.py:Net" in told
    assert not (folder / "ran").exists()


def test_neither_does_code_whose_neighbour_has_changed(folder: Path) -> None:
    (folder / "parts.py").write_text("")
    (folder / "net.py").write_text("import parts\n" + CODE)
    assert run(["inspect", "net.pt", "--arch", "net.py:Net"]) == 0
    assert run(["inspect", "net.pt"]) == 0
    (folder / "parts.py").write_text("open('ran', 'w')\n")
    assert run(["inspect", "net.pt"]) == 2
    assert not (folder / "ran").exists()


def test_it_does_not_run_for_another_checkpoint_in_the_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "net.pt").write_bytes((folder / "small.pt").read_bytes())
    assert run(["inspect", "net.pt"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "net.pt has changed since net.py:Net was named for it" in told
    assert "not run unasked" in told


def test_a_copy_elsewhere_was_not_named(folder: Path) -> None:
    (folder / "copy.pt").write_bytes((folder / "net.pt").read_bytes())
    assert run(["inspect", "copy.pt"]) == 2


def test_it_is_listed_and_forgotten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["archs", "--remembered", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    schemas.check(told)
    assert [Path(entry["file"]).name for entry in told["remembered"]] == ["net.pt", "small.pt"]
    assert run(["archs", "--forget", "net.pt", "--json"]) == 0
    schemas.check(json.loads(capsys.readouterr().out))
    assert run(["inspect", "net.pt"]) == 2
    assert run(["inspect", "small.pt"]) == 0
    assert run(["archs", "--forget", "net.pt"]) == 2
    assert "nothing is remembered of net.pt" in capsys.readouterr().err
    assert run(["archs", "--forget", "all"]) == 0
    assert named_code.everything() == []
    del folder


def test_a_damaged_memory_or_one_that_cannot_be_written_costs_a_name_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for entry in (named_code.folder() / "named-code").iterdir():
        entry.write_text("{")
    assert run(["inspect", "net.pt"]) == 2
    (folder / "file").write_text("")
    monkeypatch.setenv("PRUNEKIT_STATE", str(folder / "file"))
    assert run(["inspect", "net.pt", "--arch", "net.py:Net"]) == 0
