"""Imports run one way, and the light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prunekit

ROOT = Path(prunekit.__file__).parent
LAYERS = [
    *("errors", "spec", "plan", "files", "nn", "surgery", "models", "data", "programs", "exporting", "checkpoint"),
    *("evaluation", "training", "restore", "methods", "api", "workflows", "report", "cli"),
]


def _layer(path: Path) -> str | None:
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return name if name in LAYERS else None


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found.update(name.split(".")[1] for name in names if name.startswith("prunekit."))
    return found & set(LAYERS)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_downwards(path: Path) -> None:
    layer = _layer(path)
    if layer is None:  # __init__ and __main__ stand above everything
        return
    above = [other for other in _imported(path) if LAYERS.index(other) > LAYERS.index(layer)]
    assert not above, f"{layer} imports {above}"


def test_every_package_has_a_layer() -> None:
    packages = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert packages - {"__init__", "__main__"} == set(LAYERS)


@pytest.mark.parametrize(
    "module",
    [
        "prunekit",
        "prunekit.cli",
        "prunekit.methods.slim.method",
        "prunekit.methods.merge.method",
        "prunekit.training.config",
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
