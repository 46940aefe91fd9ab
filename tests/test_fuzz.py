"""Whatever is read and whatever is asked for: a defined exit status, two lines of error at most, nothing half written.

A few hundred examples run with every test session, always the same; the thousands (`-m slow`) are new ones each time.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import prunekit as pk
from commands import leaves
from networks import lively
from prunekit import checkpoint, models
from prunekit.cli.app import run
from prunekit.errors import InputError

ALLOWED = {0, 1, 2, 3}
FLAGS = [name for name in leaves() if name != "demo"]
fuzzed = settings(suppress_health_check=list(HealthCheck))


def small_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return lively(models.build("vgg_digits", {"config": "4-M-4"})).float()


@cache
def samples() -> dict[str, bytes]:
    """One good file of each kind that commands read, by its name."""
    model, found = small_network(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint.save(model, folder / "own.pt")
        torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "weights.pth")
        torch.save(model.state_dict(), folder / "legacy.th", _use_new_zipfile_serialization=False)
        safetensors.torch.save_file(model.state_dict(), str(folder / "weights.safetensors"))
        program = torch.export.export(model, (torch.zeros(1, 1, 8, 8),))
        torch.export.save(program, folder / "program.pt2")
        Image.new("L", (8, 8), 99).save(folder / "image.png")
        (folder / "settings.toml").write_text('ratio = 0.5\n[slim]\nscope = "all"\nround-to = 2\n')
        assert (
            quietly(
                ["sweep", str(folder / "own.pt"), "--no-latency", "--ratios", ".5", "-o", str(folder / "sweep.json")]
            )[0]
            == 0
        )
        for path in folder.iterdir():
            found[path.name] = path.read_bytes()
    return found


def command_for(name: str, folder: Path) -> list[str]:
    """A command that reads the file of that name in `folder`."""
    file = str(folder / name)
    if name == "settings.toml":
        return ["slim", str(folder / "good.pt"), "--config", file, "--dry-run"]
    if name == "sweep.json":
        return ["sweep", str(folder / "good.pt"), "--no-latency", "--ratios", ".5", "-o", file, "--resume"]
    if name == "image.png":
        return ["eval", str(folder / "good.pt"), "--data", str(folder / "images"), "--no-latency"]
    weights = name.startswith(("weights", "legacy"))
    return ["inspect", file, *(["--arch", "vgg_digits", "--arch-args", "config=4-M-4"] if weights else [])]


def quietly(arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO())
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = run(arguments)
        out.flush()
        return status, out.buffer.getvalue().decode(errors="replace"), err.getvalue()
    finally:
        sys.stdin = stdin


@contextmanager
def folder_with(files: dict[str, bytes]) -> Iterator[Path]:
    """A folder with these files, a good model, and a folder of images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "good.pt").write_bytes(samples()["own.pt"])
        for path, content in files.items():
            (folder / path).write_bytes(content)
        if "image.png" in files:
            for number in range(10):
                (folder / "images" / str(number)).mkdir(parents=True)
                shutil.copy(folder / "image.png", folder / "images" / str(number))
        yield folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_end(arguments: list[str], status: int, err: str) -> None:
    """A defined status, no traceback, and an error of two lines at most beside warnings and notes."""
    assert status in ALLOWED, f"{arguments}: {status}\n{err}"
    assert "Traceback" not in err
    if status >= 2:
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert [line.partition(":")[0] for line in lines[-2:]][-1] in ("error", "hint"), err
        assert sum(line.startswith("error: ") for line in lines) == 1, err


# what happens to bytes: some are changed, cut out, put in, or repeated
EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "insert", "zero", "end")),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 64),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    data = bytearray(content)
    for kind, share, length, other in edits:
        place = int(share * len(data))
        if kind == "flip" and data:
            data[place] ^= other[0] or 1
        elif kind == "cut":
            del data[place : place + length]
        elif kind == "insert":
            data[place:place] = other
        elif kind == "zero":
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == "end":
            del data[place:]
    return bytes(data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            "torchvision:resnet18",
            "os.py:system",
            "prunekit:resnet56",
            "features.0",
            "../x",
            "torch.ops.aten.relu.default",
        ]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], other: Any, gone: bool) -> Any:
    if not path:
        return other
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    if gone:
        del place[path[-1]]
    else:
        place[path[-1]] = other
    return value


def own_file(header: Any) -> bytes:
    content = torch.load(io.BytesIO(samples()["own.pt"]), weights_only=True)
    stream = io.BytesIO()
    torch.save({**content, "prunekit": json.dumps(header)}, stream)
    return stream.getvalue()


def pt2_file(program: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(samples()["program.pt2"])) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.namelist():
            content = json.dumps(program).encode() if member.endswith("models/model.json") else old.read(member)
            new.writestr(member, content)
    return stream.getvalue()


@cache
def structured() -> dict[str, tuple[Any, Callable[[Any], bytes]]]:
    """The JSON inside files, and how it is put back."""
    header = json.loads(torch.load(io.BytesIO(samples()["own.pt"]), weights_only=True)["prunekit"])
    with zipfile.ZipFile(io.BytesIO(samples()["program.pt2"])) as archive:
        member = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        program = json.loads(archive.read(member))
    return {
        "own.pt": (header, own_file),
        "program.pt2": (program, pt2_file),
        "sweep.json": (json.loads(samples()["sweep.json"]), lambda value: json.dumps(value).encode()),
    }


def read_damaged(name: str, content: bytes) -> None:
    with folder_with({name: content}) as folder:
        before = listing(folder)
        arguments = command_for(name, folder)
        status, out, err = quietly(arguments)
        check_end(arguments, status, err)
        assert not out or status in (0, 1)
        if status:
            assert listing(folder) == before


def damaged_bytes(name: str, edits: list[tuple[str, float, int, bytes]]) -> None:
    read_damaged(name, edited(samples()[name], edits))


def damaged_json(name: str, share: float, other: Any, gone: bool) -> None:
    value, put_back = structured()[name]
    every = places(value)
    read_damaged(name, put_back(replaced(value, every[int(share * len(every))], other, gone)))


NAMES = st.sampled_from(
    (
        "own.pt",
        "weights.pth",
        "legacy.th",
        "weights.safetensors",
        "program.pt2",
        "image.png",
        "settings.toml",
        "sweep.json",
    )
)
bytes_cases = given(name=NAMES, edits=EDITS)
json_cases = given(
    name=st.sampled_from(("own.pt", "program.pt2", "sweep.json")),
    share=st.floats(0, 1, exclude_max=True),
    other=JSON,
    gone=st.booleans(),
)


@pytest.mark.parametrize("name", ["own.pt", "weights.pth", "legacy.th", "weights.safetensors", "program.pt2"])
def test_no_beginning_of_a_file_is_a_file(name: str) -> None:
    for length in range(40):
        with pytest.raises(InputError):
            pk.load(io.BytesIO(samples()[name][:length]), arch="vgg_digits", arch_args={"config": "4-M-4"})


# Values for flags: some good for many, some for none.
VALUES = st.sampled_from(
    (
        *("0", "1", "2", "-1", "0.5", ".3", "1e-3", "1e400", "nan", "inf", "50%", "2K", "0%", "101%", "9" * 30),
        *("x", "", " ", "é", "\x1b[31m", "a=b", "config=4-M-4", "=", ",", ".5,.5", "8", "1x8x8", "0x0", "digits"),
        *("nowhere", ".", "/dev/null", "/", "-", "cpu", "good.pt", "prunekit:vgg_digits", "vgg_digits", "torchvision:"),
        *("os:system", "x.py:y", "merge:restore=none", "out.pt", "table", "csv", "markdown", "all", "inner", "none"),
        *("calibrate", "l2-GM", "onnx", "pt2", "report.html", "p.svg"),
    )
)
# Commands whose work takes long however small the network is say so themselves.
QUICK = {
    "train": ["--epochs", "1", "--batch-size", "256", "--arch-args", "config=4-M-4"],
    "export": [
        "--no-latency",
        "--format",
        "pt2",
        "--tolerance",
        "-1",
    ],  # the checks of flags alone: an export takes seconds
    "eval": ["--no-latency"],
    "compare": ["--no-latency"],
    "sweep": ["--no-latency", "--ratios", "0.5"],
}
# Flags whose effect is time, or a process of its own.
LEFT_OUT = frozenset(("--help", "--epochs", "--iterations", "--latency", "--tensorboard", "--device", "--debug"))


@cache
def flags_of(name: str) -> list[tuple[str, bool]]:
    """The flags of a command, and whether each takes a value."""
    command = leaves()[name]
    found = [(opt, not p.is_flag) for p in command.params for opt in p.opts if p.param_type_name == "option"]
    return [(flag, valued) for flag, valued in found if flag not in LEFT_OUT]


def combination(name: str, chosen: list[tuple[float, str]], model: str) -> None:
    every = flags_of(name)
    words = name.split()
    arguments = words if name in ("train", "methods", "completion") and model == "good.pt" else [*words, model]
    for share, value in chosen:
        flag, valued = every[int(share * len(every))]
        arguments += [flag, value] if valued else [flag]
    arguments += QUICK.get(name, [])
    before_folder = Path.cwd()
    with folder_with({}) as folder:
        os.chdir(folder)
        try:
            before = listing(folder)
            status, _, err = quietly(arguments)
            check_end(arguments, status, err)
            after = listing(folder)
            assert not [path for path in after if path.endswith(".tmp")], arguments
            if status >= 2:
                assert after == before, arguments
        finally:
            os.chdir(before_folder)


combinations = given(
    name=st.sampled_from(FLAGS),
    chosen=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), VALUES), max_size=4),
    model=st.sampled_from(("good.pt", "good.pt", "good.pt", "prunekit:vgg_digits", "nowhere.pt", "-", "")),
)


def few(count: int, cases: Callable[[Any], Any], check: Callable[..., None]) -> Any:
    """A test of `count` examples, always the same."""
    return settings(fuzzed, max_examples=count)(cases(check))


def many(count: int, cases: Callable[[Any], Any], check: Callable[..., None]) -> Any:
    """The same test for an hour of its own, with other examples each time."""
    test = settings(fuzzed, max_examples=count, derandomize=False)(cases(check))
    return pytest.mark.slow(pytest.mark.timeout(7200)(test))


test_damaged_bytes = few(120, bytes_cases, damaged_bytes)
test_damaged_json = few(80, json_cases, damaged_json)
test_combinations_of_flags = few(50, combinations, combination)

test_6000_damaged_files = many(6000, bytes_cases, damaged_bytes)
test_4000_damaged_documents = many(4000, json_cases, damaged_json)
test_500_combinations_of_flags = many(500, combinations, combination)
