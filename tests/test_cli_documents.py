"""What the documentation says is run: its commands, its examples, its Python."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import prunekit as pk
from commands import leaves
from prunekit import surgery
from prunekit.cli.app import root_command, run
from prunekit.methods.base import Method
from prunekit.models import build

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *(ROOT / "docs").glob("*.md")]
)


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    """Every `prunekit …` that the pages and the help texts show, without what the shell takes for itself."""
    shown = [line for page in PAGES for block in blocks(page, "sh", "console") for line in joined(block)]
    for command in leaves().values():
        helped = command.help.split("Examples:")[-1]
        shown += [line.strip() for line in helped.splitlines()]
    parts = [part for line in shown for part in re.split(r" \| | && |\$\(", line)]
    plain = [re.split(r" >>? |\)\"|#", part)[0].strip() for part in parts]
    return sorted({part for part in plain if part.startswith("prunekit ")})


def joined(block: str) -> list[str]:
    """The lines of a block, those that end with a backslash with the next."""
    return [line.strip() for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", commands())
def test_every_command_that_is_shown_exists_with_its_options(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merge.toml").write_text('model = "slim.pt"')
    words = shlex.split(command)[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in leaves() else words[0]
    parser = leaves().get(name) or root_command().get_command(None, name)
    parser.make_context(name, words[len(name.split()) :])


@pytest.mark.parametrize("name", leaves())
def test_every_command_has_examples_and_help_for_each_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"  prunekit {name}" in text or f"-m prunekit {name}" in text
    for parameter in leaves()[name].params:
        assert parameter.help, f"{name} {parameter.name}"


def test_the_documented_keys_are_those_of_the_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    said = set(re.findall(r"`([a-z_0-9]+)`", text))
    model, small = "prunekit:vgg_digits", str(tmp_path / "small.pt")
    for command in (
        ["inspect", model],
        ["merge", model, "--ratio", ".5", "-o", small],
        ["eval", model, "--no-latency"],
        ["train", model, "--data", "digits", "--dry-run"],
        ["compare", model, "--no-latency"],
        ["methods"],
        ["completion", "zsh"],
    ):
        assert run([*command, "--json"]) == 0
        assert set(json.loads(capsys.readouterr().out)) <= said | {"schema", "version"}


def test_the_example_of_a_method_works() -> None:
    space: dict[str, Any] = {}
    exec(blocks(ROOT / "docs" / "adding-a-method.md", "python")[0], space)
    method: Any = space["LargestFilters"]()
    assert isinstance(method, Method)
    model, x = build("resnet20").double(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    graph = surgery.trace(model, x)
    plan = method.plan(model, graph, space["LargestFilters"].Config(target_params="25%", power=1.0))
    small = surgery.edit(model, plan, graph)
    assert surgery.verify(model, small, plan, graph) < 1e-10
    assert sum(p.numel() for p in small.parameters()) <= 0.25 * sum(p.numel() for p in model.parameters())


NEEDS = {"prune-a-yolo": "ultralytics"}  # packages that only the commands of one page need
_ELSEWHERE = {"adding-a-method.md", "your-own-task.md"}  # run by the test above, and by tests/test_tasks.py
RUNNABLE = [page for page in PAGES if blocks(page, "sh", "python") and page.name not in _ELSEWHERE]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """All of its shell, from top to bottom in one folder, then its Python in the same; and what it says comes true."""
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem], reason=f"needs the extra `{NEEDS[page.stem]}`")
    folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    script = "\n".join(blocks(page, "sh"))
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, check=True)
    program = "\n".join(blocks(page, "python"))
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    if check := CHECKS.get(page.stem):
        check(Run(tmp_path))


class Figures(NamedTuple):
    """Accuracy on the test digits, 0 to 1, and MACs of one image."""

    accuracy: float
    macs: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What the commands of a page left in its folder."""

    folder: Path

    def measured(self, *names: str, arch: str | None = None) -> list[Figures]:
        """The figures of the networks of these names."""
        digits, found = pk.open_data("digits"), []
        for name in names:
            result = pk.evaluate(pk.load(self.folder / f"{name}.pt", arch=arch), digits)
            assert result.accuracy is not None
            assert result.macs is not None
            found.append(Figures(result.accuracy, result.macs))
        return found


def check_readme(run: Run) -> None:
    model, slim, tuned, small = run.measured("model", "slim", "tuned", "small")
    assert small.macs < slim.macs == tuned.macs < 0.3 * model.macs
    assert tuned.accuracy >= slim.accuracy - IMAGE
    assert small.accuracy >= 0.97


def check_tutorial(run: Run) -> None:
    arch = f"{run.folder / 'mynet.py'}:Net"
    model, slim, small, smaller = run.measured("mynet", "slim", "small", "smaller", arch=arch)
    assert slim.macs <= 0.4 * model.macs
    assert smaller.macs < small.macs < slim.macs
    assert min(slim.accuracy, small.accuracy) >= model.accuracy - 0.03


def check_methods(run: Run) -> None:
    model, pruned, merged, restored = run.measured("model", "pruned", "merged", "restored")
    assert pruned.accuracy <= merged.accuracy <= restored.accuracy + IMAGE
    assert merged.macs < model.macs


CHECKS = {"README": check_readme, "tutorial": check_tutorial, "methods": check_methods}
IMAGE = 1 / 355 + 1e-9  # the accuracy that one test image is worth


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_ends_as_the_readme_shows(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prunekit", "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, stderr=subprocess.PIPE, text=True)
    demo = Run(tmp_path / "prunekit-demo")
    usual, pruned, merged, sparse, slim, tuned = demo.measured("usual", "pruned", "merged", "sparse", "slim", "tuned")
    assert pruned.accuracy < merged.accuracy
    assert merged.macs <= pruned.macs < 0.6 * usual.macs
    assert slim.macs == tuned.macs < 0.3 * sparse.macs
    assert tuned.accuracy >= slim.accuracy
    assert min(merged.accuracy, tuned.accuracy) >= usual.accuracy - 0.015
    suggested = done.stderr.rstrip().splitlines()[-1].split()
    assert suggested[:2] == ["prunekit", "fit"]
    subprocess.run([sys.executable, "-m", *suggested], cwd=tmp_path, env=environment, check=True)
    assert Run(tmp_path).measured("small")[0].macs < 0.8 * usual.macs


def test_every_picture_is_in_the_gallery() -> None:
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert f"](pictures/{picture.name})" in gallery


def test_links_between_documents_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
