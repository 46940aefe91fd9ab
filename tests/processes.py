"""Programs in processes of their own that start in milliseconds: forks of a process that has imported torch already.

It is not the process of the tests that forks: its threads would be missing in the fork, and with them whatever
autograd has begun there.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import resource
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from torch.distributed import TCPStore

import prunekit
from prunekit.cli.app import run

Program = Callable[[], "int | None"]
_FORKS = multiprocessing.get_context("forkserver")
_ATTEMPTS, _PAUSE = 5, 0.2
_OURS = [module.name for module in pkgutil.walk_packages(prunekit.__path__, "prunekit.") if "__" not in module.name]
_FORKS.set_forkserver_preload(
    ["torch", "torchvision", "rich.table", "pydantic.type_adapter", "typer._adapters", *_OURS]
)


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    returncode: int
    stdout: bytes
    stderr: bytes


def command(*arguments: str | bytes) -> Program:
    """A command of prunekit's."""
    return partial(run, [os.fsdecode(argument) for argument in arguments])


def script(path: Path, *arguments: str) -> Program:
    """A Python file as a program."""
    return partial(_run_script, str(path), arguments)


def start(
    program: Program,
    folder: Path,
    files: Sequence[Path],
    *,
    environment: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> ForkServerProcess:
    """Start a program in that folder with three files as its streams; it writes no file over `limit` bytes.

    A fork server that dies (a machine short of memory) takes the request with it: a new one is asked, a few times.
    """
    for left in reversed(range(_ATTEMPTS)):
        process = _FORKS.Process(target=_child, args=(program, folder, list(files), dict(environment or {}), limit))
        try:
            process.start()
            break
        except (EOFError, ConnectionError):
            if not left:
                raise
            time.sleep(_PAUSE)  # it is noticed once its process has ended
    return process


def status(process: ForkServerProcess) -> int:
    """Wait for the end; the exit status, or a signal's number negated."""
    process.join(240)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def ended(
    program: Program,
    folder: Path,
    *,
    content: bytes = b"",
    environment: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Ended:
    """Run a program to its end, with `content` as its standard input."""
    with tempfile.TemporaryDirectory() as name:
        files = streams(Path(name), content=content)
        code = status(start(program, folder, files, environment=environment, limit=limit))
        return Ended(code, files[1].read_bytes(), files[2].read_bytes())


def together(program: Program, folder: Path, size: int = 2) -> list[Ended]:
    """Run a program in several processes that find each other as torchrun's do."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    with tempfile.TemporaryDirectory() as name:
        files = [streams(Path(name), str(rank)) for rank in range(size)]
        processes = [
            start(program, folder, files[rank], environment={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(size)
        ]
        codes = [status(process) for process in processes]
        return [
            Ended(code, out.read_bytes(), err.read_bytes()) for code, (_, out, err) in zip(codes, files, strict=True)
        ]


def streams(folder: Path, name: str = "", *, content: bytes = b"") -> list[Path]:
    """Files for standard input, output and error."""
    files = [folder / f"{stream}{name}" for stream in ("in", "out", "err")]
    files[0].write_bytes(content)
    return files


def _run_script(path: str, arguments: Sequence[str]) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _child(
    program: Program, folder: Path, files: Sequence[Path], environment: Mapping[str, str], limit: int | None
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(files[number], mode, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, m, closefd=False) for n, m in enumerate("rww"))  # noqa: SIM115
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(program())
