"""What surrounds the commands: completion in real shells, settings from files, and the schemas of the documents."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import schemas
from commands import leaves
from prunekit import checkpoint, models
from prunekit.cli.app import run
from prunekit.methods import registry

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "net.pt"
    checkpoint.save(models.build("vgg_digits", {"config": "8-8-M-16"}), path)
    return path


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH begins with this very `prunekit`, as completion calls it by name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "prunekit"
    script.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c \"import sys; sys.argv[0] = 'prunekit'; "
        'from prunekit.cli import main; main()" "$@"\n'
    )
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "TERM": "xterm"}


def shell(name: str, script: str, environment: dict[str, str], folder: Path) -> str:
    """Standard output of a script in that shell, without anybody's own settings."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here")
    command = {"bash": [path, "--norc", "-c"], "fish": [path, "--no-config", "-c"], "zsh": [path, "-f", "-c"]}[name]
    settings: dict[str, Any] = {"env": environment, "cwd": folder, "capture_output": True, "text": True}
    done = subprocess.run([*command, script], timeout=90, check=False, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


_BASH = """
eval "$(prunekit completion bash)"
complete -p prunekit
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _prunekit_completion prunekit; echo "${COMPREPLY[@]}"; }
ask prunekit s
ask prunekit merge m.pt --crit
ask prunekit merge m.pt --criterion l2
ask prunekit inspect m.pt --arch resnet5
"""
_FISH = """
prunekit completion fish | source
complete -C "prunekit s" | cut -f 1 | string join " "
complete -C "prunekit merge m.pt --crit" | cut -f 1 | string join " "
complete -C "prunekit merge m.pt --criterion l2" | cut -f 1 | string join " "
complete -C "prunekit inspect afi"
"""
# zsh completes on a terminal alone: one of its own, where Tab is pressed and the line that results is looked at.
_ZSH = r"""
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z 'PS1=; unsetopt zle_bracketed_paste; autoload -U compinit; compinit -u -D'
zpty -w z 'eval "$(prunekit completion zsh)"; echo re''ady'
zpty -r -m z line '*ready*'
zpty -w -n z $'prunekit sw\t --rati\t'
zpty -r -m z line '*prunekit sweep*--ratios*' && print -r -- sweep ratios
zpty -d z
"""


def test_bash_completes(program: dict[str, str], tmp_path: Path) -> None:
    lines = shell("bash", _BASH, program, tmp_path).splitlines()
    assert lines == [
        "complete -o default -F _prunekit_completion prunekit",
        "slim sweep",
        "--criterion",
        "l2-norm l2-GM",
        "resnet56_cifar resnet50",
    ]


def test_fish_completes(program: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "afile.pt").touch()
    lines = shell("fish", _FISH, {**program, "HOME": str(tmp_path)}, tmp_path).splitlines()
    assert lines == ["slim sweep", "--criterion", "l2-GM l2-norm", "afile.pt"]


def test_zsh_completes(program: dict[str, str], tmp_path: Path) -> None:
    assert shell("zsh", _ZSH, program, tmp_path) == "sweep ratios\n"


def test_a_shell_that_is_not_known(capsys: Capture) -> None:
    assert run(["completion", "tcsh"]) == 2
    assert "unknown shell 'tcsh'" in capsys.readouterr().err


def settings(capsys: Capture, *arguments: object) -> str:
    """What `--print-config` writes, without the origins."""
    capsys.readouterr()
    assert run([*map(str, arguments), "--print-config"]) == 0
    return re.sub(r"  # [^\n]*", "", capsys.readouterr().out)


NAMES = [name for name in leaves() if name not in ("demo", "methods", "completion", "archs")]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_reads_back_the_same(name: str, tmp_path: Path, capsys: Capture) -> None:
    words = name.split()
    model = [] if name == "train" else ["model “x”\\.pt"]
    flags = ["--mean", ".1,.2", "-q", *(["--ratio", "1e-1"] if name in registry.names() else [])]
    more = ["--method", "slim", "--method", "merge:restore=none"] if name == "sweep" else []
    printed = settings(capsys, *words, *model, *flags, *more)
    file = tmp_path / "all.toml"
    file.write_text(printed, encoding="utf-8")
    assert settings(capsys, *words, "--config", file) == printed
    file.write_text(f"[{'.'.join(words)}]\n{printed}\n[demo]\nforce = true\n", encoding="utf-8")
    assert settings(capsys, *words, f"--config={file}") == printed


def test_a_run_with_a_file_is_the_run_with_its_flags(network: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["merge", str(network), "--target-macs", "60%", "--criterion", "l2-norm", "--lambda", "0.5"]
    file = tmp_path / "merge.toml"
    file.write_text(settings(capsys, *flags))
    assert run([*flags, "-o", str(tmp_path / "by-flags.pt")]) == 0
    assert run(["merge", "--config", str(file), "-o", str(tmp_path / "by-file.pt")]) == 0
    assert (tmp_path / "by-flags.pt").read_bytes() == (tmp_path / "by-file.pt").read_bytes()
    dry = ["merge", "--config", str(file), "--dry-run", "--json", "--lambda", "0.25"]
    capsys.readouterr()
    assert run(dry) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert (found["lam"], found["criterion"], found["target_macs"]) == (0.25, "l2-norm", "60%")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ratoi = 0.5", "unknown setting 'ratoi', which no command has"),
        ("[slim]\nbudget = 0.5", "unknown setting 'budget' of 'slim'"),
        ("[slmi]\nratio = 0.5", "unknown command 'slmi'"),
        ("ratio = true", "expected text or a number"),
        ("dry-run = 1", "expected true or false"),
        ("ratio = 1979-05-27", "of type date"),
        ("ratio = {a = 1}", "unknown command 'ratio'"),
        ("ratio = 'half'", "--ratio"),
        ("ratio = [[1]]", "of type list"),
        ("scope = 'outer'", "unknown scope 'outer'"),
        ("config = 'other.toml'", "unknown setting 'config'"),
        ("ratio = ", "cannot read the settings in"),
        ("\udcff", "cannot read the settings in"),
    ],
)
def test_bad_files_of_settings(content: str, message: str, network: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert run(["slim", str(network), "--config", str(file)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == [file]
    assert run(["slim", str(network), "--config", str(tmp_path)]) == 2


def test_every_command_has_a_schema() -> None:
    names = [name.replace(" ", ".") for name in leaves() if name not in registry.names()]
    assert {path.stem for path in schemas.FOLDER.glob("*.json")} == {*names, "method"}


def test_the_documents_of_what_is_installed(capsys: Capture) -> None:
    for arguments in (["methods"], ["archs"], ["completion", "bash"]):
        assert run([*arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        schemas.check(found)
    assert run(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"slim", "merge"} <= {method["name"] for method in found["methods"]}
    assert all(method["error"] is None for method in found["methods"])


@pytest.mark.parametrize("path", sorted(schemas.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_schemas_refuse_what_is_wrong(path: Path) -> None:
    """A key too many, and each required one missing or of another kind, is seen."""
    root = json.loads(path.read_text())
    good = _sample(root, root)
    good["schema"] = "prunekit.slim" if path.stem == "method" else f"prunekit.{path.stem}"
    schemas.check(good)
    for key in root["required"]:
        bad = copy.deepcopy(good)
        del bad[key]
        if key != "schema":
            with pytest.raises(AssertionError, match="is a required property"):
                schemas.check(bad)
            with pytest.raises(AssertionError):
                schemas.check({**good, key: object()})
    with pytest.raises(AssertionError, match="Additional properties"):
        schemas.check({**good, "more": 1})


def _sample(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """The least value that a schema allows."""
    if "$ref" in schema:
        return _sample(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if "anyOf" in schema:
        return _sample(schema["anyOf"][-1], root)
    kind = schema.get("type", "null")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        keys = [*schema.get("required", ()), *schema.get("oneOf", [{}])[0].get("required", ())]
        return {key: _sample(schema["properties"][key], root) for key in keys}
    if kind == "string":
        return "0" * 64
    if kind == "array":
        return [_sample(schema["items"], root)] * schema.get("minItems", 1)
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    open_end = (schema.get("exclusiveMaximum", low + 1) - low) / 2 if "exclusiveMinimum" in schema else 0
    return {"null": None, "boolean": True}.get(kind, low + open_end)
