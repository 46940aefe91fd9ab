"""The examples run, and the example of a plug-in is installed as anybody would install it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import schemas
from processes import Program, command, ended, script
from prunekit import checkpoint, models
from prunekit.cli.app import run

EXAMPLES = Path(__file__).parents[1] / "examples"


def with_plugin(place: str, arguments: list[str]) -> int:
    """A command where the packages at that place are installed too."""
    sys.path.insert(0, place)
    return run(arguments)


def output(program: Program, folder: Path, status: int = 0) -> str:
    """Standard output of a program in that folder."""
    done = ended(program, folder)
    assert done.returncode == status, done.stderr
    return done.stdout.decode()


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the example's package is installed by pip from a copy of its source; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLES / "plugin", folder / "source")
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    install = [sys.executable, "-m", "pip", "install", *offline, "--target", "installed", "./source"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(folder / "installed")


def test_a_method_from_another_package_is_a_command(plugin: str, tmp_path: Path) -> None:
    def prunekit(*arguments: str, status: int = 0) -> str:
        return output(partial(with_plugin, plugin, list(arguments)), tmp_path, status)

    checkpoint.save(models.build("vgg_digits", {"config": "8-8-M-16"}), tmp_path / "net.pt")
    listed = json.loads(prunekit("methods", "--json"))
    schemas.check(listed)
    found = {method["name"]: method for method in listed["methods"]}["dice"]
    assert found["package"] == "prunekit-dice 0.1.0"
    assert "seed" in {setting["name"] for setting in found["settings"]}
    assert "--seed" in prunekit("dice", "--help")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        given = ["dice", "net.pt", "--ratio", "0.5", "--seed", seed, "-o", f"{name}.pt"]
        assert prunekit(*given) == f"{name}.pt\n"
    content = [(tmp_path / f"{name}.pt").read_bytes() for name in "abc"]
    assert content[0] == content[1] != content[2]
    # what it wrote is read where the plug-in is not installed
    assert "dice, ratio=0.5" in output(command("inspect", "a.pt"), tmp_path)
    # a budget of any kind is met without a line of the plug-in's
    prunekit("dice", "net.pt", "--target-macs", "50%", "-o", "half.pt")
    prunekit("dice", "net.pt", "--target-macs", "1%", status=2)


def test_a_restoration_from_another_package_is_a_choice_of_every_method(plugin: str, tmp_path: Path) -> None:
    def prunekit(*arguments: str, status: int = 0) -> str:
        return output(partial(with_plugin, plugin, list(arguments)), tmp_path, status)

    checkpoint.save(models.build("vgg_digits", {"config": "8-8-M-16"}), tmp_path / "net.pt")
    listed = json.loads(prunekit("methods", "--json"))
    schemas.check(listed)
    found = {way["name"]: way for way in listed["restorations"]}["means"]
    assert (found["package"], found["needs_images"]) == ("prunekit-dice 0.1.0", True)
    given = ["net.pt", "--data", "digits", "--calibration", "50", "--restore", "means", "--dry-run", "--json"]
    for method in ("slim", "merge", "dice", "random"):
        assert "means" in prunekit(method, "--help")
        done = json.loads(prunekit(method, *given, "--ratio", "0.3"))
        schemas.check({**done, "schema": "prunekit.slim"})  # that of every method
        assert done["settings"]["restore"] == done["plan"]["notes"]["restore"] == "means"
        assert done["plan"]["fold"]
    assert "restore = 'means'" in prunekit("slim", "--ratio", "0.3", *given, "--print-config").replace('"', "'")
    prunekit("slim", "net.pt", "--ratio", "0.3", "--restore", "means", status=2)  # without images


def test_pruning_by_hand(tmp_path: Path) -> None:
    out = output(script(EXAMPLES / "prune_by_hand.py"), tmp_path)
    before, after = (int(n.replace(",", "")) for n in re.findall(r"^([\d,]+) parameters", out, re.MULTILINE))
    assert after < before
    assert "differ by at most" in out


@pytest.mark.slow
def test_a_network_of_ones_own(tmp_path: Path) -> None:
    out = output(script(EXAMPLES / "prune_your_own.py", str(tmp_path)), tmp_path)
    accuracies = [float(found) for found in re.findall(r": ([\d.]+)%", out)]
    assert len(accuracies) == 3
    assert accuracies[2] > 90
    assert (tmp_path / "small.pt2").exists()


@pytest.mark.slow
def test_pruning_by_sensitivity(tmp_path: Path) -> None:
    out = output(script(EXAMPLES / "sensitivity_guided.py"), tmp_path)
    guided, even = (float(re.search(rf"{name}: ([\d.]+)%", out)[1]) for name in ("by sensitivity", "evenly"))  # type: ignore[index]
    assert guided > even
