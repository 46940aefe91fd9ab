"""The public names: complete, typed, imported lazily, documented by examples that run, and enough for their users."""

from __future__ import annotations

import ast
import doctest
import inspect
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

import prunekit as pk
from prunekit import checkpoint
from prunekit.exporting.writer import ExportOptions
from prunekit.methods.manidp.config import RUNTIMES
from prunekit.methods.merge.config import MergeConfig
from prunekit.methods.slim.config import SlimConfig

ROOT = Path(__file__).parents[1]
ROOMS = [name for name in pk.__all__ if inspect.ismodule(getattr(pk, name))]
ALIASES = [name for name in pk.__all__ if isinstance(getattr(pk, name), types.UnionType)]


def test_all_names_are_there_and_found_by_tools() -> None:
    assert {*pk.__all__, "__version__"} <= set(dir(pk))
    assert len(set(pk.__all__)) == len(pk.__all__)
    for name in pk.__all__:
        assert getattr(pk, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'slam'"):
        _ = pk.slam  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", [pk, pk.manidp], ids=["prunekit", "manidp"])
def test_type_checkers_see_what_is_imported_lazily(package: types.ModuleType) -> None:
    """What stands under `TYPE_CHECKING` is what `__all__` says and what is found at run time."""
    assert package.__file__ is not None
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}
    assert sorted(seen) == sorted(package.__all__)
    for name, (module, original) in seen.items():
        assert module is not None
        home = __import__(module, fromlist=[original])
        assert getattr(package, name) is getattr(home, original), name


@pytest.mark.parametrize("name", [name for name in pk.__all__ if name not in ROOMS])
def test_no_room_hides_a_public_function(name: str) -> None:
    assert not any((Path(pk.__file__).parent / f"{name}{suffix}").exists() for suffix in ("", ".py"))


def _documented(name: str) -> str:
    return inspect.getdoc(getattr(pk, name)) or ""


@pytest.mark.parametrize("name", [name for name in pk.__all__ if name not in ALIASES])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subject = getattr(pk, name)
    # of a class its own text alone: what it inherits says something else
    text = subject.__doc__ if isinstance(subject, type) else inspect.getdoc(subject)
    example = doctest.DocTestParser().get_doctest(text or "", {}, name, None, 0)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not result.failed, "".join(said)


@pytest.mark.parametrize("name", [n for n in pk.__all__ if inspect.isfunction(getattr(pk, n)) and n not in ROOMS])
def test_every_argument_is_described(name: str) -> None:
    described = set(re.findall(r"^    \**(\w+): ", _documented(name).partition("Args:")[2], re.MULTILINE))
    assert set(inspect.signature(getattr(pk, name)).parameters) <= described


REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def members(room: str) -> list[str]:
    """What the reference shows of a room: all of it, or what it lists."""
    module = getattr(pk, room)
    listed = re.search(rf"^::: {module.__name__}\n    options:\n      members: \[(.+)\]$", REFERENCE, re.MULTILINE)
    return listed[1].split(", ") if listed else list(module.__all__)


@pytest.mark.parametrize("room", ROOMS)
def test_the_names_of_rooms_are_documented(room: str) -> None:
    module = getattr(pk, room)
    assert set(members(room)) <= set(module.__all__)
    assert [name for name in members(room) if not inspect.getdoc(getattr(module, name))] == []


def test_the_reference_renders_every_name() -> None:
    shown = re.findall(r"^::: prunekit\.([\w.]+)$", REFERENCE, re.MULTILINE)
    missing = set(pk.__all__) - set(ROOMS) - set(shown)
    assert not missing
    assert len(set(shown)) == len(shown)
    for room in ROOMS:
        module = getattr(pk, room).__name__
        assert f"::: {module}\n" in REFERENCE, room


def _settings(function: Callable[..., Any], *others: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    settings = {name: parameter for name, parameter in parameters.items() if name not in others}
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in settings.values())
    return settings


def _choices(hint: Any) -> set[str]:
    """The strings that an annotation allows, if it lists them."""
    if get_origin(hint) is Literal:
        return {value for value in get_args(hint) if isinstance(value, str)}
    return {choice for part in get_args(hint) for choice in _choices(part)}


def _listed(field: Field[Any]) -> set[str]:
    """The choices of a setting that an annotation can list: not those that grow with what is installed."""
    return set() if callable(field.metadata["choices"]) else set(field.metadata["choices"])


@pytest.mark.parametrize(
    ("function", "config"), [(pk.slim, SlimConfig), (pk.merge, MergeConfig)], ids=["slim", "merge"]
)
def test_functions_take_the_settings_of_their_methods(function: Callable[..., Any], config: type[pk.Config]) -> None:
    settings = _settings(function, "model", "x", "images", "examples", "on_progress")
    hints = get_type_hints(function)
    assert list(settings) == [field.name for field in fields(config)]
    for field in fields(config):
        assert settings[field.name].default == field.default
        assert _choices(hints[field.name]) == _listed(field), field.name
    assert hints["return"] is pk.Pruned


@pytest.mark.parametrize(
    ("function", "written", "others"),
    [
        (pk.load, checkpoint.load, ("source", "runtime", "budget", "mean", "std", "input_size")),
        (pk.export, ExportOptions, ("model", "target", "x", "images", "force")),
    ],
    ids=["load", "export"],
)
def test_functions_take_the_settings_of_what_they_call(
    function: Callable[..., Any], written: Callable[..., Any], others: tuple[str, ...]
) -> None:
    asked = {name: p.default for name, p in inspect.signature(written).parameters.items() if name not in others}
    assert {name: p.default for name, p in _settings(function, *others).items()} == asked


def test_the_runtimes_are_named() -> None:
    found = inspect.signature(pk.load).parameters["runtime"].annotation
    assert set(re.findall(r"'(\w+)'", found)) == set(RUNTIMES)


def network() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(4, 2, 1)).eval()


@pytest.mark.parametrize("prune", [pk.slim, pk.merge, lambda *a, **s: pk.prune("slim", *a, **s)])
def test_the_result_unpacks_to_model_and_plan(prune: Callable[..., pk.Pruned]) -> None:
    model, x = network(), torch.zeros(1, 3, 8, 8)
    done = prune(model, x, ratio=0.5)
    assert isinstance(done, pk.Pruned)
    small, plan = done
    assert small is done.model
    assert plan is done.plan
    assert done.after.params < done.before.params


def test_a_ratio_for_each_group_is_any_mapping() -> None:
    ratios = types.MappingProxyType({"0": 0.5})
    assert pk.slim(network(), torch.zeros(1, 3, 8, 8), ratio=ratios).plan.keeps[0].group == "0"


def test_a_setting_that_a_method_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match="ration"):
        pk.slim(network(), ration=0.5)  # type: ignore[call-arg]
    with pytest.raises(pk.InputError, match="no setting 'ration'"):
        pk.prune("slim", network(), ration=0.5)


@pytest.mark.parametrize("module", ["prunekit", "prunekit.methods.manidp"])
def test_looking_around_does_not_import_torch(module: str) -> None:
    code = (
        f"import sys, {module}; dir({module}); from prunekit import Config, Keep, Method, Plan, TrainConfig, option; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


USERS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/**/*.py")])


def _foreign_names(tree: ast.AST) -> Iterator[str]:
    """What a file imports or reads of prunekit beside its public names."""
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "prunekit":
            public = pk.__all__ if node.module == "prunekit" else ()
            yield from (f"from {node.module} import {a.name}" for a in node.names if a.name not in public)
        if isinstance(node, ast.Import):
            own = [alias for alias in node.names if alias.name.partition(".")[0] == "prunekit"]
            called |= {alias.asname or alias.name for alias in own}
            yield from (f"import {alias.name}" for alias in own if alias.name != "prunekit")
    known = {f"{prefix}{room}": members(room) for room in ROOMS for prefix in ("", "pk.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            names = pk.__all__ if owner in called else known.get(owner)
            if names is not None and node.attr not in names:
                yield f"{owner}.{node.attr}"


@pytest.mark.parametrize("path", USERS, ids=[path.stem for path in USERS])
def test_benchmarks_and_examples_use_public_names_alone(path: Path) -> None:
    assert list(_foreign_names(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        *("from prunekit.data import ImageSet", "import prunekit.api", "from prunekit import api"),
        *(
            "import prunekit as pk\npk.api.prune",
            "from prunekit import surgery\nsurgery.tracing",
            "import prunekit as pk\npk.models.beside",
        ),
    ],
)
def test_other_names_are_noticed(code: str) -> None:
    assert list(_foreign_names(ast.parse(code)))


TYPED = """
import torch
import prunekit as pk

model = torch.nn.Sequential()
reveal_type(pk.slim(model, ratio=0.5).model)
small, plan = pk.merge(model, ratio={"0": 0.5}, restore="moments")
reveal_type(pk.manidp.add_gates(model, pk.manidp.GateRecipe()))
pk.slim(model, ration=0.5)
pk.slim(model, scope="outer")
pk.load("net.pt", runtime="fast")
pk.export(model, "net.pt2", fold_bn="yes")
pk.slam(model)
pk.manidp.add_gate
"""
SEEN = {
    6: "torch.nn.modules.module.Module",
    8: "torch.nn.modules.module.Module",
    9: 'Unexpected keyword argument "ration" for "slim"',
    10: 'Argument "scope" to "slim" has incompatible type',
    11: 'Argument "runtime" to "load" has incompatible type',
    12: 'Argument "fold_bn" to "export" has incompatible type',
    13: 'Module has no attribute "slam"',
    14: 'Module has no attribute "add_gate"',
}


@pytest.mark.slow
def test_a_type_checker_sees_through_calls(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(TYPED, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--hide-error-context",
        "--cache-dir",
        str(tmp_path),
        "user.py",
    ]
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    told = re.findall(r"^user\.py:(\d+): (?:error|note): (.*)$", done.stdout, re.MULTILINE)
    assert {int(line) for line, _ in told} == set(SEEN), done.stdout
    for number, text in SEEN.items():
        assert any(int(line) == number and text in said for line, said in told), done.stdout
