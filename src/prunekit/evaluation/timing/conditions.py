"""Conditions of a latency: runtime, batch, threads, device and machine, and the clock that suits them."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from prunekit.devices import CPU, name_of, synchronise
from prunekit.errors import InputError, unknown_name
from prunekit.evaluation.latency import threads_limited

RUNTIMES = ("pytorch", "onnx")
# Timings are done when the odd and the even turns agree to `AGREED`, or after `_SECONDS` of them; where they differ by
# more than `_NOISY` then, the machine cannot measure.
AGREED, _NOISY, _SECONDS = 0.01, 0.1, 4.0
_TURNS, _CALLS = 4, 4


@dataclass(frozen=True)
class Conditions:
    """What a latency holds for.

    Attributes:
        runtime: `pytorch` (as it is, in inference mode) or `onnx` (the exported file in ONNX Runtime, on the CPU).
        batch: Images a pass.
        threads: CPU threads of the runtime.
        device: The device, by PyTorch's name.
        version: The runtime's version.
        machine: The processor, and how much of it.
    """

    runtime: str
    batch: int
    threads: int
    device: str
    version: str
    machine: str

    @classmethod
    def here(
        cls,
        runtime: str | None = None,
        batch: int | None = None,
        threads: int | None = None,
        device: torch.device = CPU,
    ) -> Conditions:
        """Return the conditions on this machine: by default PyTorch, one image, and the threads that PyTorch uses.

        Raises:
            InputError: There is no such runtime, or a package is missing.
        """
        runtime = runtime or RUNTIMES[0]
        if runtime not in RUNTIMES:
            raise unknown_name("runtime", runtime, RUNTIMES)
        on = CPU if runtime == "onnx" else device
        threads = threads or torch.get_num_threads()
        return cls(runtime, batch or 1, threads, str(on), _version(runtime), _machine(on))

    @property
    def clock(self) -> str:
        """`cpu` where one thread does all the work: what others do on the machine does not count then. Else `wall`."""
        return "cpu" if self.threads == 1 and self.device == "cpu" else "wall"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Run inside with this number of threads, and without gradients."""
        with torch.inference_mode(), threads_limited(self.threads):
            yield

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the time of one call in seconds: of its thread where that is all, otherwise on the wall."""
        read = time.thread_time if self.clock == "cpu" else time.perf_counter
        device = torch.device(self.device)
        synchronise(device)
        start = read()
        run()
        synchronise(device)
        return read() - start

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, with the clock."""
        return {**asdict(self), "clock": self.clock}


def milliseconds(runs: Sequence[Callable[[], object]], conditions: Conditions) -> tuple[list[float], float]:
    """Return the time of a call of each in milliseconds, the least of many, and the spread of these figures.

    Disturbances only ever add time. They come and go, so that only what is timed in turns can be compared: a few calls
    of one, a few of the next. The spread says how well a figure would be found again: by what share the best of odd
    and of even turns differ.

    Raises:
        InputError: The machine is too noisy to measure anything.
    """
    turns: list[list[float]] = [[] for _ in runs]
    spent = 0.0
    with conditions.held():
        while len(turns[0]) < _TURNS or (_spread(turns) > AGREED and spent < _SECONDS):
            for times, run in zip(turns, runs, strict=True):
                run()  # what ran before has left the caches full of something else
                found = [conditions.seconds(run) for _ in range(_CALLS)]
                times.append(min(found))
                spent += sum(found)
    spread = _spread(turns)
    check_spread(spread)
    return [1e3 * min(times) for times in turns], spread


def check_spread(spread: float) -> None:
    """Raise `InputError` where the best timings of one network differ by so large a share that they say nothing."""
    if spread > _NOISY:
        raise InputError(
            f"this machine is too noisy to measure a latency: the best timings of one network differ by {spread:.0%}",
            hint="stop what else runs, or give --latency-threads 1, where only the thread's own time counts",
        )


def _spread(turns: Sequence[Sequence[float]]) -> float:
    """Return the largest share by which the least of the odd and of the even turns differ."""
    pairs = [(min(times[1::2]), min(times[::2])) for times in turns]
    return max(abs(odd - even) / max(min(odd, even), 1e-9) for odd, even in pairs)


def _version(runtime: str) -> str:
    if runtime == "pytorch":
        return str(torch.__version__)
    for package in ("onnxruntime", "onnxscript"):
        try:
            version(package)
        except PackageNotFoundError:
            raise InputError(
                f"--latency-on onnx needs the package {package}", hint="pip install 'prunekit[onnx]'"
            ) from None
    return version("onnxruntime")


def _machine(device: torch.device) -> str:
    if device.type != "cpu":
        return name_of(device)
    kind = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        lines = facts.read_text(encoding="utf-8", errors="replace").splitlines()
        kind = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), kind)
    return f"{kind}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {platform.system()}"
