"""Training in two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunekit.errors import InputError
from prunekit.training.world import World, is_main_process, join

ROOT = Path(__file__).resolve().parents[1]


def test_two_processes_train_as_one() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(ROOT / "benchmarks" / "two_processes.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("yes") == 5
    assert "Warning" not in done.stderr


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
