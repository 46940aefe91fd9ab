"""Training in two processes, as torchrun starts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from processes import script, together
from prunekit.errors import InputError
from prunekit.training.world import World, is_main_process, join

ROOT = Path(__file__).resolve().parents[1]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    first, other = together(script(ROOT / "benchmarks" / "two_processes.py"), tmp_path)
    assert (first.returncode, other.returncode) == (0, 0), (first, other)
    assert first.stdout.count(b"yes") == 5
    assert other.stdout == b""
    assert b"Warning" not in first.stderr + other.stderr


def test_one_process_is_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    world = join("cpu")
    assert world == World(0, 1, torch.device("cpu"))
    assert world.is_main
    values = torch.tensor([1.0, 2.0])
    assert world.summed(values) is values
    assert is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()


def test_devices_that_are_not_there() -> None:
    with pytest.raises(InputError, match="device 'abacus' cannot be used"):
        join("abacus")
