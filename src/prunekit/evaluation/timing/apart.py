"""Timing of ONNX files as they are used: in processes of their own, without PyTorch.

What else a process has loaded, and where its memory lies, makes a small network slower there by several percent, and
another one by another share. So the files are timed in new processes, in turns, and the best of them counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunekit.errors import SurgeryError
from prunekit.evaluation.timing.conditions import AGREED, Conditions, check_spread

_PROCESSES = (2, 4)  # at least, and where they disagree at most
_SECONDS = 1.0  # of each process

# Times the files in turns, a few calls of one and a few of the next, and prints the best seconds of each.
_FRESH = """
import json, sys, time
import numpy as np, onnxruntime
clock, threads, limit, inputs, *paths = sys.argv[1:]
read = getattr(time, clock)
def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
arrays = list(np.load(inputs).values())
sessions = [session(path) for path in paths]
feeds = [dict(zip((entry.name for entry in one.get_inputs()), arrays)) for one in sessions]
best, spent, turns = [float("inf")] * len(sessions), 0.0, 0
while turns < 4 or spent < float(limit):
    for number, one in enumerate(sessions):
        one.run(None, feeds[number])  # what ran before has left the caches full of something else
        for _ in range(4):
            start = read()
            one.run(None, feeds[number])
            taken = read() - start
            best[number] = min(best[number], taken)
            spent += taken
    turns += 1
print(json.dumps(best))
"""


@dataclass(frozen=True)
class OnnxFile:
    """The content of an ONNX file, and what it is to be timed on, in the order of its inputs."""

    content: bytes
    inputs: tuple[NDArray[np.generic], ...]


def milliseconds_apart(files: Sequence[OnnxFile], conditions: Conditions) -> tuple[list[float], float]:
    """Return the time of a call of each in milliseconds, the least over processes, and by what share these differ.

    The files are read with the inputs of the first.

    Raises:
        InputError: The machine is too noisy to measure anything.
        SurgeryError: ONNX Runtime does not run a file.
    """
    found: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        inputs, paths = Path(folder) / "inputs.npz", [Path(folder) / f"{n}.onnx" for n in range(len(files))]
        np.savez(inputs, *files[0].inputs)
        for path, file in zip(paths, files, strict=True):
            path.write_bytes(file.content)
        clock = "thread_time" if conditions.clock == "cpu" else "perf_counter"
        arguments = [clock, str(conditions.threads), str(_SECONDS), str(inputs), *map(str, paths)]
        least, most = _PROCESSES
        while len(found) < least or (len(found) < most and _spread(found) > AGREED):
            found.append(_seconds(arguments))
    spread = _spread(found)
    check_spread(spread)
    return [1e3 * min(times) for times in zip(*found, strict=True)], spread


def _seconds(arguments: Sequence[str]) -> list[float]:
    done = subprocess.run([sys.executable, "-I", "-c", _FRESH, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
        raise SurgeryError(f"the exported network does not run in a process of its own: {words}")
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def _spread(found: Sequence[Sequence[float]]) -> float:
    """Return the largest share by which the second best process lies above the best."""
    pairs: list[list[float]] = [sorted(times)[:2] for times in zip(*found, strict=True)]
    return max([second / max(first, 1e-9) - 1 for first, second in pairs], default=0.0)
