"""What the world does to a program: full disks, odd paths, no home, two at once, and Ctrl-C at every moment."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from processes import Ended, command, ended, start, status, streams
from prunekit import checkpoint, models
from prunekit.cli.app import run
from prunekit.errors import InputError

PRUNEKIT = [sys.executable, "-m", "prunekit"]
Factory = pytest.TempPathFactory
PLAIN = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model in it."""
    checkpoint.save(models.build("vgg_digits", {"config": "8-8-M-16"}), tmp_path / "net.pt")
    return tmp_path


def prunekit(folder: Path, *arguments: str | bytes, content: bytes = b"", limit: int | None = None) -> Ended:
    """Run a command in a process of its own; no file over `limit` bytes."""
    return ended(command(*arguments), folder, content=content, limit=limit)


def process(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
    """Run a command as a program of its own."""
    command = [*PRUNEKIT, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment or PLAIN, capture_output=True, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def check_refused(done: Ended, *said: str) -> None:
    """Exit status 2 and two lines at most, which say this."""
    err = done.stderr.decode(errors="replace")
    assert (done.returncode, done.stdout) == (2, b""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2, err
    assert all(part in err for part in said), err


def test_a_disk_that_fills_up_leaves_nothing(folder: Path) -> None:
    given = ["merge", "net.pt", "--ratio", ".5", "-o", "small.pt"]
    check_refused(prunekit(folder, *given, limit=2000), "cannot write small.pt", "File too large")
    assert {path.name for path in folder.iterdir()} == {"net.pt"}
    (folder / "small.pt").write_bytes(b"precious")
    check_refused(prunekit(folder, *given, "--force", limit=2000), "cannot write small.pt")
    assert (folder / "small.pt").read_bytes() == b"precious"


@pytest.mark.parametrize("target", ["/sys/small.pt", "/proc/small.pt", "net.pt/small.pt", "/dev/full"])
def test_places_that_cannot_be_written(target: str, folder: Path) -> None:
    check_refused(prunekit(folder, "merge", "net.pt", "--ratio", ".5", "-o", target, "--force"), target)
    assert {path.name for path in folder.iterdir()} == {"net.pt"}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_no_permission(folder: Path) -> None:
    (folder / "closed").mkdir(0o500)
    check_refused(prunekit(folder, "merge", "net.pt", "--ratio", ".5", "-o", "closed/small.pt"), "Permission denied")
    (folder / "net.pt").chmod(0)
    check_refused(prunekit(folder, "inspect", "net.pt"), "Permission denied")


@pytest.mark.parametrize(
    "name", ["mödel 名前 (1).pt", "-dash.pt", "new\nline.pt", "'quotes\".pt", "🙂.pt", "x" * 240 + ".pt"]
)
def test_any_name_of_a_file_will_do(name: str, folder: Path) -> None:
    done = prunekit(folder, "merge", "./net.pt", "--ratio", ".5", "-o", f"./{name}", "-q")
    assert (done.returncode, done.stdout.decode()) == (0, f"{name}\n"), done.stderr
    assert prunekit(folder, "inspect", "--json", "--", f"./{name}").returncode == 0


def test_a_name_that_is_no_text(folder: Path) -> None:
    name = b"b\xe4d\xff.pt"
    done = prunekit(folder, "merge", "net.pt", "--ratio", ".5", "-o", name, "-q")
    assert (done.returncode, done.stdout) == (0, name + b"\n"), done.stderr
    done = prunekit(folder, "inspect", name, "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout.decode(errors="replace"))


def test_symbolic_links(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "link.pt").symlink_to("elsewhere/real.pt")
    (folder / "model.pt").symlink_to("net.pt")
    assert prunekit(folder, "merge", "model.pt", "--ratio", ".5", "-o", "link.pt").returncode == 0
    assert (folder / "link.pt").is_symlink()
    assert not (folder / "elsewhere/real.pt").is_symlink()
    check_refused(prunekit(folder, "merge", "model.pt", "--ratio", ".3", "-o", "link.pt"), "exists")
    assert prunekit(folder, "merge", "model.pt", "--ratio", ".3", "-o", "link.pt", "--force").returncode == 0
    assert (folder / "link.pt").is_symlink()
    (folder / "loop.pt").symlink_to("loop.pt")
    check_refused(prunekit(folder, "inspect", "loop.pt"), "loop.pt")
    check_refused(prunekit(folder, "merge", "net.pt", "--ratio", ".5", "-o", "loop.pt"), "loop.pt")


ODD: list[dict[str, str | None]] = [
    {"HOME": "/proc", "XDG_CACHE_HOME": "/proc", "MPLCONFIGDIR": None, "LC_ALL": "tr_TR.UTF-8", "TZ": "Nowhere/Land"},
    {"HOME": None, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TERM": None, "COLUMNS": "1"},
    {"HOME": "/nonexistent", "PATH": "", "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "-3"},
]


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD, ids=["read-only home", "no home", "no path"])
def test_odd_surroundings(odd: dict[str, str | None], folder: Path) -> None:
    environment = {key: value for key, value in {**PLAIN, **odd}.items() if value is not None}
    done = process(folder, "merge", "net.pt", "--ratio", ".5", "-o", "ä.pt", environment=environment)
    assert (done.returncode, done.stdout.decode()) == (0, "ä.pt\n"), done.stderr
    given = ["compare", "net.pt", "ä.pt", "--data", "digits", "--no-latency", "--picture", "c.png"]
    done = process(folder, *given, environment=environment)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_one_of_several_that_write_one_file_wins_and_the_others_say_so(folder: Path, tmp_path_factory: Factory) -> None:
    place, ratios = tmp_path_factory.mktemp("streams"), [".2", ".3", ".4", ".5"]
    files = [streams(place, ratio) for ratio in ratios]
    given = ["merge", "net.pt", "-o", "small.pt", "-q", "--ratio"]
    ends = [status(process) for process in [start(command(*given, r), folder, files[i]) for i, r in enumerate(ratios)]]
    said = [err.read_text() for _, _, err in files]
    assert sorted(ends) == [0, 2, 2, 2], said
    assert all("exists" in text for text, status in zip(said, ends, strict=True) if status)
    won = ratios[ends.index(0)]
    assert prunekit(folder, "merge", "net.pt", "--ratio", won, "-o", "alone.pt").returncode == 0
    assert (folder / "small.pt").read_bytes() == (folder / "alone.pt").read_bytes()
    assert {path.name for path in folder.iterdir()} == {"net.pt", "small.pt", "alone.pt"}


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    with pytest.raises(InputError, match="exists already"):
        checkpoint.atomic_write(path, lambda _: path.write_bytes(b"theirs") and None)
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_on_standard_input(folder: Path) -> None:
    for name in ("inspect", "eval"):
        check_refused(prunekit(folder, name, "-"), "standard input is empty")
    check_refused(prunekit(folder, "merge", "-", "--ratio", ".5", "-o", "-"), "standard input is empty")
    check_refused(prunekit(folder, "inspect", "-", content=b"PK"), "zip archive")


@pytest.mark.parametrize("ratio", [".5", "5"])
def test_commands_behind_each_other(ratio: str, folder: Path, tmp_path_factory: Factory) -> None:
    """Each starts before the one before it has ended, and reads what that one writes."""
    place = tmp_path_factory.mktemp("streams")
    commands = [
        command("slim", "net.pt", "--ratio", ratio, "-o", "-"),
        command("merge", "-", "--ratio", ".2", "-o", "-"),
        command("eval", "-", "--data", "digits", "--no-latency", "--json"),
    ]
    files = [streams(place, str(number)) for number in range(3)]
    for before, after in itertools.pairwise(files):
        os.mkfifo(before[1])
        after[0] = before[1]
    running = [start(program, folder, streams) for program, streams in zip(commands, files, strict=True)]
    ends, said = [status(process) for process in running], files[0][2].read_text()
    if ratio == ".5":
        assert ends == [0, 0, 0], [err.read_text() for _, _, err in files]
        assert 0 <= json.loads(files[2][1].read_text())["accuracy"] <= 1
    else:
        assert ends == [2, 2, 2]
        assert "a ratio must lie between" in said
        assert "standard input is empty" in files[1][2].read_text()
    assert {path.name for path in folder.iterdir()} == {"net.pt"}


PIPELINE = """
set -o pipefail
prunekit() { "$PYTHON" -m prunekit "$@"; }
prunekit slim net.pt --ratio $RATIO -o - | prunekit merge - --ratio .2 -o - |
    prunekit eval - --data digits --json | jq .accuracy
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("jq") is None or shutil.which("bash") is None, reason="no jq or no bash here")
@pytest.mark.parametrize("ratio", [".5", "5"])
def test_a_pipeline_in_bash(ratio: str, folder: Path) -> None:
    environment = {**PLAIN, "PYTHON": sys.executable, "RATIO": ratio}
    done = subprocess.run(["bash", "-c", PIPELINE], env=environment, cwd=folder, capture_output=True, check=False)
    if ratio == ".5":
        assert done.returncode == 0, done.stderr
        assert 0 <= float(done.stdout) <= 1
    else:
        assert done.returncode == 2
        assert b"a ratio must lie between" in done.stderr
    assert {path.name for path in folder.iterdir()} == {"net.pt"}


def interrupt(folder: Path, arguments: list[str], seconds: float) -> tuple[int, str]:
    """Exit status and standard error of a command that gets Ctrl-C after some time."""
    process = subprocess.Popen(
        [*PRUNEKIT, *arguments], cwd=folder, env=PLAIN, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    return process.returncode, err.decode(errors="replace")


def check_interruptions(folder: Path, moments: int) -> None:
    chance = random.Random(0)
    before = {path.name for path in folder.iterdir()}
    arguments = ["merge", "net.pt", "--ratio", ".5", "-o", "small.pt", "--data", "digits", "--calibration", "200"]
    started = time.monotonic()
    assert process(folder, *arguments).returncode == 0
    usual = time.monotonic() - started
    whole = (folder / "small.pt").read_bytes()
    (folder / "small.pt").unlink()
    for _ in range(moments):
        # not in the first tenth of a second: the interpreter itself is not yet up
        status, err = interrupt(folder, arguments, chance.uniform(0.1, usual))
        assert status in (130, 0, -signal.SIGINT), err
        assert "Traceback" not in err or "site.py" in err, err
        left = {path.name for path in folder.iterdir()} - before
        assert left == ({"small.pt"} if status == 0 else set()) or left == {"small.pt"}, left
        if left:
            assert (folder / "small.pt").read_bytes() == whole
            (folder / "small.pt").unlink()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_interrupted_at_many_moments(folder: Path) -> None:
    check_interruptions(folder, 40)


MERGE = ["merge", "net.pt", "--ratio", ".5", "-o", "small.pt", "--data", "digits", "--calibration", "200"]


def interrupted_at(call: int) -> int:
    """Run a command that gets Ctrl-C at that of its calls; its last line of output is how many there were."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests were started with it ignored
    calls = itertools.count()

    def count(_: object, event: str, __: object) -> None:
        if event == "call" and next(calls) == call:
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(count)
    try:
        return run(MERGE)
    finally:
        sys.setprofile(None)
        print(next(calls))


def test_interrupted_at_any_call(folder: Path) -> None:
    alone = ended(partial(interrupted_at, -1), folder)
    assert alone.returncode == 0, alone.stderr
    calls, whole = int(alone.stdout.split()[-1]), (folder / "small.pt").read_bytes()
    (folder / "small.pt").unlink()
    codes = []
    for part in range(1, 6):
        done = ended(partial(interrupted_at, part * calls // 6), folder)
        codes.append(done.returncode)
        assert done.returncode in (130, 0), done.stderr
        assert b"Traceback" not in done.stderr
        left = {path.name for path in folder.iterdir()} - {"net.pt"}
        assert left == ({"small.pt"} if done.returncode == 0 else set()) or left == {"small.pt"}
        if left:
            assert (folder / "small.pt").read_bytes() == whole
            (folder / "small.pt").unlink()
    assert codes.count(130) >= 3


_MEMORY = """
import gc, resource, threading, time, torch
from prunekit import api, models

def resident():
    with open("/proc/self/statm") as table:
        return int(table.read().split()[1]) * resource.getpagesize()

def watch():
    while not done:
        peaks.append(resident())
        time.sleep(0.005)

torch.set_num_threads(1)
api.prune("merge", models.build("torchvision:resnet18"), ratio=0.5, restore="none")
gc.collect()
start, peaks, done = resident(), [], False
model = models.build("torchvision:resnet152")
size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
watcher = threading.Thread(target=watch)
watcher.start()
api.prune("merge", model, ratio=0.5, restore="none")
done = True
watcher.join()
print((max(peaks) - start) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_surgery_takes_two_and_a_half_times_the_model(folder: Path) -> None:
    """The model itself, the smaller one, and what the proof needs."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], cwd=folder, env=PLAIN, capture_output=True, check=True)
    assert float(done.stdout) < 2.5


def test_a_copy_that_shares_weights_leaves_them_alone() -> None:
    import copy

    from prunekit.surgery.copying import aliases

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    shared = copy.deepcopy(model, aliases(model))
    assert shared[0].weight.data_ptr() == model[0].weight.data_ptr()
    shared.double().train()(torch.randn(3, 2).double())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.data_ptr() == before[name][1]
