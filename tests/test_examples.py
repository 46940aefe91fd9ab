"""The examples run, and the example of a plug-in is installed as anybody would install it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import prunekit
import schemas
from prunekit import checkpoint, models

EXAMPLES = Path(__file__).parents[1] / "examples"
SOURCE = str(Path(prunekit.__file__).parents[1])


def python(folder: Path, *arguments: str, path: str = SOURCE, status: int = 0) -> str:
    """Standard output of a Python process in that folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A search path with the example's package, installed by pip from a copy of its source; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLES / "plugin", folder / "source")
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    python(folder, "-m", "pip", "install", *offline, "--target", "installed", "./source")
    return f"{SOURCE}{os.pathsep}{folder / 'installed'}"


def test_a_method_from_another_package_is_a_command(plugin: str, tmp_path: Path) -> None:
    checkpoint.save(models.build("vgg_digits", {"config": "8-8-M-16"}), tmp_path / "net.pt")
    listed = json.loads(python(tmp_path, "-m", "prunekit", "methods", "--json", path=plugin))
    schemas.check(listed)
    found = {method["name"]: method for method in listed["methods"]}["random"]
    assert found["package"] == "prunekit-random 0.1.0"
    assert "seed" in {setting["name"] for setting in found["settings"]}
    assert "--seed" in python(tmp_path, "-m", "prunekit", "random", "--help", path=plugin)
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        given = ["random", "net.pt", "--ratio", "0.5", "--seed", seed, "-o", f"{name}.pt"]
        assert python(tmp_path, "-m", "prunekit", *given, path=plugin) == f"{name}.pt\n"
    content = [(tmp_path / f"{name}.pt").read_bytes() for name in "abc"]
    assert content[0] == content[1] != content[2]
    # what it wrote is read where the plug-in is not installed
    assert "random, ratio=0.5" in python(tmp_path, "-m", "prunekit", "inspect", "a.pt")
    # a budget of any kind is met without a line of the plug-in's
    python(tmp_path, "-m", "prunekit", "random", "net.pt", "--target-macs", "50%", "-o", "half.pt", path=plugin)
    python(tmp_path, "-m", "prunekit", "random", "net.pt", "--target-macs", "1%", path=plugin, status=2)


def test_pruning_by_hand(tmp_path: Path) -> None:
    out = python(tmp_path, str(EXAMPLES / "prune_by_hand.py"))
    before, after = (int(n.replace(",", "")) for n in re.findall(r"^([\d,]+) parameters", out, re.MULTILINE))
    assert after < before
    assert "differ by at most" in out


@pytest.mark.slow
def test_a_network_of_ones_own(tmp_path: Path) -> None:
    out = python(tmp_path, str(EXAMPLES / "prune_your_own.py"), str(tmp_path))
    accuracies = [float(found) for found in re.findall(r": ([\d.]+)%", out)]
    assert len(accuracies) == 3
    assert accuracies[2] > 90
    assert (tmp_path / "small.pt2").exists()


@pytest.mark.slow
def test_pruning_by_sensitivity(tmp_path: Path) -> None:
    out = python(tmp_path, str(EXAMPLES / "sensitivity_guided.py"))
    guided, even = (float(re.search(rf"{name}: ([\d.]+)%", out)[1]) for name in ("by sensitivity", "evenly"))  # type: ignore[index]
    assert guided > even
