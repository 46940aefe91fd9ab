"""Settings from files, variables and the project's file, which of them wins, and the log of a command."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from prunekit.cli.app import run
from prunekit.report.terminal.output import Output

Capture = pytest.CaptureFixture[str]
Print = Callable[..., str]

SOURCES = ("flag", "file", "variable", "project", "default")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a repository whose folder `work/deep` is the working folder."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    return tmp_path


@pytest.fixture
def printed(capsys: Capture) -> Print:
    def settings(*arguments: object) -> str:
        capsys.readouterr()
        assert run([*map(str, arguments), "--print-config"]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return settings


def value(printed: str, key: str) -> str:
    """What stands behind a key, with its origin."""
    found = re.search(rf"^(?:# )?{key} =(.*)$", printed, re.MULTILINE)
    assert found is not None
    return found[1].strip()


@pytest.mark.parametrize("used", [set(some) for n in range(5) for some in itertools.combinations(SOURCES[:4], n)])
def test_who_wins(used: set[str], project: Path, printed: Print, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "some.toml").write_text("seed = 2\n")
    (project / "prunekit.toml").write_text("seed = 4\n" if "project" in used else "")
    if "variable" in used:
        monkeypatch.setenv("PRUNEKIT_SEED", "3")
    flags = [*(["--seed", 1] if "flag" in used else []), *(["--config", "../../some.toml"] if "file" in used else [])]
    expected = {
        "flag": "1  # command line",
        "file": "2  # ../../some.toml",
        "variable": "3  # PRUNEKIT_SEED",
        "project": "4  # ../../prunekit.toml",
        "default": "0",
    }
    winner = next(source for source in SOURCES if source in used | {"default"})
    assert value(printed("slim", "a.pt", "--ratio", 0.5, *flags), "seed") == expected[winner]


def test_a_table_of_a_command_wins_over_what_is_for_all(project: Path, printed: Print) -> None:
    (project / "pyproject.toml").write_text(
        "[tool.prunekit]\nseed = 1\nepochs = 7\n[tool.prunekit.train]\nseed = 2\nkeep = 'last'\n"
        "[tool.prunekit.manidp]\nseed = 3\n[tool.prunekit.manidp.train]\nkeep = 0.25\n"
    )
    train, gates, slim = printed("train"), printed("manidp", "train", "a.pt"), printed("slim", "a.pt")
    assert value(slim, "seed") == "1  # ../../pyproject.toml [tool.prunekit]"
    assert value(train, "seed") == "2  # ../../pyproject.toml [tool.prunekit.train]"
    assert value(gates, "seed") == "3  # ../../pyproject.toml [tool.prunekit.manidp]"
    assert value(gates, "keep") == "0.25  # ../../pyproject.toml [tool.prunekit.manidp.train]"
    assert value(train, "keep").startswith('"last"')
    assert all(value(one, "epochs").startswith("7") for one in (train, gates, slim))
    assert "epochs" not in printed("eval", "a.pt")


def test_variables_of_a_command_and_flags_in_words(printed: Print, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "PRUNEKIT_SEED": "1",
        "PRUNEKIT_MANIDP_TRAIN_SEED": "2",
        "PRUNEKIT_FORCE": "yes",
        "PRUNEKIT_NESTEROV": "off",
        "PRUNEKIT_RATIO": "",
    }.items():
        monkeypatch.setenv(name, text)
    found = printed("slim", "a.pt")
    assert value(found, "seed") == "1  # PRUNEKIT_SEED"
    assert value(found, "force") == "true  # PRUNEKIT_FORCE"
    assert value(found, "nesterov") == "false  # PRUNEKIT_NESTEROV"
    assert value(found, "ratio") == ""
    assert value(printed("manidp", "train", "a.pt"), "seed") == "2  # PRUNEKIT_MANIDP_TRAIN_SEED"


def test_a_variable_of_nobodys_is_a_warning(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEKIT_BATCHSIZE", "3")
    monkeypatch.setenv("PRUNEKIT_SLIM_LR", "3")
    monkeypatch.setenv("PRUNEKIT_BATCH_SIZE", "3")
    assert run(["eval", "a.pt", "--print-config"]) == 0
    assert "PRUNEKIT_BATCHSIZE is no setting of any command; did you mean PRUNEKIT_BATCH_SIZE" in (
        shown := capsys.readouterr().err
    )
    assert len(shown.splitlines()) == 1
    monkeypatch.setenv("PRUNEKIT_FORCE", "perhaps")
    assert run(["slim", "a.pt"]) == 2
    assert 'PRUNEKIT_FORCE: force = "perhaps": expected true or false' in capsys.readouterr().err


def test_the_nearest_file_up_to_the_root_of_the_repository(project: Path, printed: Print) -> None:
    (project.parent / "prunekit.toml").write_text("seed = 9\n")
    assert value(printed("slim", "a.pt"), "seed") == "0"
    (project / "prunekit.toml").write_text("seed = 1\n")
    (project / "work" / "pyproject.toml").write_text("[project]\nname = 'prunekit-of-mine'\n")
    assert value(printed("slim", "a.pt"), "seed").startswith("1 ")
    (project / "work" / "pyproject.toml").write_text("[tool.prunekit]\nseed = 2\n")
    assert value(printed("slim", "a.pt"), "seed").startswith("2 ")
    (project / "work" / "prunekit.toml").write_text("lr = 0.5\n")
    assert value(printed("slim", "a.pt"), "seed") == "0"
    (project.parent / "prunekit.toml").unlink()


def test_outside_a_repository_only_the_working_folder_counts(
    tmp_path: Path, printed: Print, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "prunekit.toml").write_text("seed = 1\n")
    monkeypatch.chdir(tmp_path / "inner")
    assert value(printed("slim", "a.pt"), "seed") == "0"
    monkeypatch.chdir(tmp_path)
    assert value(printed("slim", "a.pt"), "seed") == "1  # prunekit.toml"


def test_isolated(project: Path, printed: Print, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "prunekit.toml").write_text("seed = 1\n")
    monkeypatch.setenv("PRUNEKIT_LR", "3")
    found = printed("slim", "a.pt", "--isolated")
    assert value(found, "seed") == "0"
    assert "PRUNEKIT" not in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ratoi = 0.5", "prunekit.toml: unknown setting 'ratoi', which no command has"),
        ("[eval]\nratio = 0.5", "prunekit.toml [eval]: unknown setting 'ratio' of 'eval'"),
        ("[manidp]\nratoi = 1\n[evla]", "unknown command 'evla'"),
        ("mean = true", "expected text or a number"),
        ("arch = 'net.py:Net'", "would run code"),
        ("trust-pickle = true", "would run code"),
        ("mean = ", "cannot read the settings in"),
    ],
)
def test_bad_files_of_a_project(content: str, message: str, project: Path, capsys: Capture) -> None:
    (project / "prunekit.toml").write_text(content)
    assert run(["eval", "a.pt"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) <= 2
    assert run(["eval", "--help"]) == 0
    assert run(["eval", "a.pt", "--isolated", "--print-config"]) == 0


def test_what_a_project_may_name(project: Path, printed: Print) -> None:
    (project / "prunekit.toml").write_text("arch = 'torchvision:resnet18'\ntrust-pickle = false\nratio = 0.3\n")
    assert value(printed("eval", "a.pt"), "arch").startswith('"torchvision:resnet18"')


def log(path: Path) -> list[str]:
    """The lines of a log without their times, which every line has."""
    lines = path.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", line) for line in lines)
    return [line[26:] for line in lines]


def test_a_log_has_what_was_said_and_what_quiet_drops(tmp_path: Path, capsys: Capture) -> None:
    path, model = tmp_path / "all.log", tmp_path / "m.pt"
    small = ["train", "--arch", "vgg_digits", "--arch-args", "config=8-M-8", "--data", "digits", "--epochs", "1"]
    assert run([*small, "-o", str(model), "--log", str(path)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    first = log(path)
    assert first[0].startswith("prunekit ")
    assert "train --arch vgg_digits" in first[0]
    assert set(said) <= set(first)
    assert any(line.startswith("saved ") for line in first)
    assert first[-1] == "exit status 0"
    assert run([*small, "-o", str(model), "--log", str(path), "--force", "-q"]) == 0
    assert capsys.readouterr().err == ""
    both = log(path)
    assert both[: len(first)] == first
    assert any(line.startswith("epoch 1/1") for line in both[len(first) :])


def test_errors_are_logged_and_of_a_bug_the_traceback(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.log"
    assert run(["eval", "none.pt", "--log", str(path)]) == 2
    assert log(path)[1:] == [*capsys.readouterr().err.splitlines(), "exit status 2"]

    def fail(*_: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("prunekit.cli.commands.eval._check", fail)
    assert run(["eval", "none.pt", "--log", str(path)]) == 70
    assert "Traceback" not in capsys.readouterr().err
    text = "\n".join(log(path))
    assert text.count("Traceback") == 1
    assert "error: a bug in prunekit: ZeroDivisionError: of ours" in text
    assert text.endswith("exit status 70")


@pytest.mark.parametrize("name", ["missing/a.log", ".", "model.pt", "-"])
def test_a_log_that_cannot_be_is_told_first(
    name: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.pt").write_bytes(b"PK\x03\x04\0\0")
    assert run(["eval", "none.pt", "--log", name]) == 2
    assert "log" in capsys.readouterr().err
    assert Path("model.pt").read_bytes() == b"PK\x03\x04\0\0"


def test_work_goes_on_without_its_log(tmp_path: Path, capsys: Capture) -> None:
    path, output = tmp_path / "a.log", Output()
    output.open_log(str(path))
    path.unlink()
    path.mkdir()
    for text in ("one", "two"):
        output.note(text)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: cannot write the log {path}: Is a directory; nothing more is added to it",
        "one",
        "two",
    ]


def test_a_full_disk_is_told_before_work(capsys: Capture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    assert run(["completion", "bash", "--log", "/dev/full"]) == 2
    assert "cannot write the log /dev/full: No space left on device" in capsys.readouterr().err
