"""The program as a process: how fast it says hello, real pipes, signals, and standard output that goes away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

import processes
from processes import command, status, streams
from prunekit import checkpoint, models
from prunekit.cli.app import run

PRUNEKIT = [sys.executable, "-m", "prunekit"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments: str, **settings: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*PRUNEKIT, *arguments], stderr=subprocess.PIPE, env=ONE_THREAD, **settings)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "net.pt"
    checkpoint.save(models.build("vgg_digits", {"config": "8-8-M-16"}), path)
    return path


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from prunekit.cli.app import run; assert run(['--help']) == 0; "
        "assert run(['slim', '--help']) == 0; assert run(['eval', '--help']) == 0; "
        "loaded = {'torch', 'numpy', 'torchvision', 'rich.markdown'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    """Counted in modules, which no busy machine slows down: few of ours, and not many beside those of Typer."""
    code = "import sys; {}; print(len(sys.modules), sum(name.startswith('prunekit') for name in sys.modules))"

    def modules(first: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", code.format(first)], capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()[-2:]]

    everything, ours = modules("from prunekit.cli.app import run; run(['--help'])")
    before, _ = modules("import typer.main, json, difflib, tomllib, urllib.request")
    assert 10 < ours <= 50
    assert everything - ours <= before + 40


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    process = start("--help", stdout=writing)
    os.close(reading)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


def test_a_full_disk_behind_standard_output(network: Path, tmp_path: Path) -> None:
    files = [Path(os.devnull), Path("/dev/full"), tmp_path / "err"]
    assert status(processes.start(command("inspect", str(network)), tmp_path, files)) == 2
    assert files[2].read_text().splitlines() == ["error: cannot write to standard output: No space left on device"]


@pytest.mark.parametrize("lost", [1, 9])
def test_a_fork_server_that_dies_is_replaced(lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the system ends it for memory: what it was asked for is lost, not the test that asked."""
    asked, genuine = [], ForkServerProcess.start

    def start(process: ForkServerProcess) -> None:
        asked.append(process)
        if len(asked) <= lost:
            raise EOFError("unexpected EOF")
        genuine(process)

    monkeypatch.setattr(ForkServerProcess, "start", start)
    monkeypatch.setattr(processes.time, "sleep", lambda _: None)
    if lost == 1:
        assert processes.ended(command("--version"), tmp_path).returncode == 0
    else:
        with pytest.raises(EOFError):  # something is wrong with every one of them
            processes.ended(command("--version"), tmp_path)


def test_completion_knows_the_commands() -> None:
    environment = {**os.environ, "_PRUNEKIT_COMPLETE": "complete_bash", "COMP_WORDS": "prunekit ", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['prunekit']; from prunekit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert {"inspect", "slim", "merge", "train", "eval", "demo"} <= set(done.stdout.split())


def test_an_interrupted_run_goes_on_to_the_same_file(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    training = ["train", "--arch", "vgg_digits", "--arch-args", "config=8-M-8", "--data", "digits"]
    settings = ["--epochs", "16", "--device", "cpu", "-o"]
    files = streams(tmp_path_factory.mktemp("streams"))
    os.mkfifo(files[2])
    process = processes.start(command(*training, *settings, "net.pt"), tmp_path, files)
    with files[2].open() as err:
        assert any("epoch 2/16" in line for line in err)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        said = err.readlines()
    assert (status(process), files[1].read_bytes()) == (130, b""), said
    assert said[-2].startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"net.state", "net.metrics.jsonl"}
    assert run([*training, *settings, str(tmp_path / "net.pt"), "--resume"]) == 0
    assert run([*training, *settings, str(tmp_path / "whole.pt")]) == 0
    assert (tmp_path / "net.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert not (tmp_path / "net.state").exists()
    assert capsys.readouterr().out == f"{tmp_path / 'net.pt'}\n{tmp_path / 'whole.pt'}\n"


def in_two_processes(folder: Path, port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return subprocess.run(
        [*launcher, "-m", "prunekit", *arguments, "--device", "cpu"],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_write_and_print_once(tmp_path: Path) -> None:
    training = ["train", "--arch", "vgg_digits", "--arch-args", "config=8-M-8", "--data", "digits"]
    done = in_two_processes(tmp_path, 29517, *training, "--epochs", "2", "-o", "net.pt")
    assert (done.returncode, done.stdout) == (0, "net.pt\n"), done.stderr
    assert done.stderr.count("epoch 2/2") == 1


@pytest.mark.slow
def test_two_processes_prune_and_tune_in_passes(tmp_path: Path) -> None:
    from prunekit import checkpoint, models

    checkpoint.save(models.build("vgg_digits", {"config": "8-M-8"}), tmp_path / "net.pt")
    passes = ["--ratio", "0.4", "--data", "digits", "--epochs", "1", "--iterations", "2"]
    done = in_two_processes(tmp_path, 29518, "slim", "net.pt", *passes, "-o", "small.pt")
    assert (done.returncode, done.stdout) == (0, "small.pt\n"), done.stderr
    assert done.stderr.count("pass 2:") == 1
    assert not (tmp_path / "small.steps").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("slim", "nosuch.pt", "--ratio", "0.5"),
        ("slim", "net.pt"),
        ("slim", "prunekit:resnet21", "--ratio", "0.5"),
        ("compare", "net.pt", "prunekit:resnet21"),
        ("merge", "net.pt", "--ratio", "1.5"),
        ("merge", "net.pt", "--target-macs", "half"),
        ("slim", "net.pt", "--target-params", "50"),
        ("slim", "net.pt", "--ratio", "0.5", "--data", "no/such/folder"),
        ("slim", "net.pt", "--ratio", "0.5", "--epochs", "2"),
        ("eval", "net.pt", "nosuch.pt"),
        ("compare", "net.pt", "nosuch.pt"),
        ("compare", "net.pt", "nosuch.pt@50%"),
        ("inspect", "nosuch.pt"),
        ("train", "net.pt", "--data", "no/such/folder"),
        ("convert", "nosuch.pth", "-o", "m.pt"),
        ("export", "nosuch.pt", "-o", "m.onnx"),
        ("sweep", "nosuch.pt", "--data", "digits"),
        ("prune", "net.pt"),
        ("train", "net.pt"),
        ("eval", "net.pt", "--data", "digits", "--classes", "nosuch.txt"),
        ("eval", "net.pt", "--data", "digits", "--input-size", "big"),
        ("manidp", "train", "nosuch.pt", "--data", "digits"),
        ("manidp", "train", "net.pt"),
        ("manidp", "train", "net.pt", "--data", "digits", "--keep", "2"),
        ("manidp", "calibrate", "nosuch.pt", "--data", "digits", "--target-macs", "50%"),
        ("manidp", "calibrate", "net.pt", "--data", "digits"),
        ("manidp", "calibrate", "net.pt", "--data", "digits", "--target-macs", "500%"),
        ("manidp", "calibrate", "net.pt", "--data", "digits", "--target-macs", "50%", "--foresee", "-1"),
        ("manidp", "report", "nosuch.pt", "--data", "digits"),
        ("manidp", "report", "net.pt", "--data", "no/such/folder"),
        ("manidp", "prune-static", "nosuch.pt", "--data", "digits"),
        ("manidp", "prune-static", "net.pt", "--data", "digits", "-o", "net.pt"),
    ],
    ids=" ".join,
)
def test_what_can_be_told_without_torch_is(arguments: tuple[str, ...], network: Path) -> None:
    words = [str(network) if word == "net.pt" else word for word in arguments]
    code = (
        "import sys; from prunekit.cli.app import run; status = run(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, cwd=network.parent
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
