"""Latency as a goal: what was asked for, what a fresh process measures, and accuracy at equal latency.

    python benchmarks/latency_goals.py --json benchmarks/results/latency-goals.json \
        --resnet56 ResNet.cifar10.original.56.pth.tar --data path/to/cifar10

Every network is pruned to shares of its present latency in ONNX Runtime on one thread. Original and result are then
written as ONNX files, and new processes without prunekit time both in turns; the ratio of their best times counts. It
is the thread's own time, so that a busy machine measures what a quiet one does. torchvision's networks have random
weights, and are pruned plainly; with `--data` the published ResNet-56 is also restored from 1,000 training images, to
latency goals and to MACs, and scored on all test images. Finished rows are read back from the JSON file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import prunekit as pk

NETWORKS = {
    "resnet18": "torchvision:resnet18",
    "resnet50": "torchvision:resnet50",
    "mobilenet_v2": "torchvision:mobilenet_v2",
    "efficientnet_b0": "torchvision:efficientnet_b0",
}
ARCH = {"arch": "resnet56_cifar", "arch_args": {"shortcut": "conv", "relu": "input"}}
CIFAR = pk.InputSpec((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
SHARES = ("75%", "60%", "50%")
MACS = ("70%", "60%", "50%", "40%", "30%")
PROCESSES = 3  # where its memory lies makes one process a few percent faster or slower than the next
WITHIN = (-0.08, 0.03)

# Times ONNX files in turns, a few calls of one and a few of the next, and prints the best milliseconds of each.
_FRESH = """
import json, sys, time
import numpy as np, onnxruntime
def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
def once(one):
    start = time.thread_time()
    one.run(None, feeds[one])
    return time.thread_time() - start
sessions = [session(path) for path in sys.argv[1:]]
draw = np.random.default_rng(0)
feeds = {s: {i.name: draw.standard_normal(i.shape).astype(np.float32) for i in s.get_inputs()} for s in sessions}
best = [float("inf")] * len(sessions)
spent = 0.0
while spent < 2:
    for number, one in enumerate(sessions):
        once(one)
        for _ in range(4):
            taken = once(one)
            best[number] = min(best[number], taken)
            spent += taken
print(json.dumps([1e3 * seconds for seconds in best]))
"""


def main() -> None:
    """Measure what is not in the file yet."""
    options = _options()
    torch.set_num_threads(1)
    path = Path(options.json)
    found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    document: dict[str, Any] = {
        "schema": "prunekit.bench.latency_goals",
        "version": 1,
        "command": "python benchmarks/latency_goals.py --json FILE --resnet56 CHECKPOINT --data path/to/cifar10",
        "rows": found,
    }
    done = {(row["network"], row["kind"], row["asked"]) for row in found}
    for network, kind, asked in _asked(options):
        if (network, kind, asked) in done:
            continue
        row = {"network": network, "kind": kind, "asked": asked, **_row(network, kind, asked, options)}
        found.append(row)
        print(json.dumps(row), flush=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _asked(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    plain = [(name, "latency", share) for name in NETWORKS for share in SHARES]
    if options.resnet56 is None:
        return plain
    plain += [("resnet56", "latency", share) for share in SHARES]
    if options.data is None:
        return plain
    restored = [("resnet56", "latency, restored", share) for share in SHARES]
    return [*plain, *restored, *(("resnet56", "macs, restored", share) for share in MACS)]


def _row(network: str, kind: str, asked: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune one network, and measure it in new processes."""
    model = pk.load(NETWORKS[network]) if network in NETWORKS else pk.load(options.resnet56, **ARCH)
    size = 224 if network in NETWORKS else 32
    settings: dict[str, Any] = {"restore": "none", "scope": "all" if network in NETWORKS else "inner"}
    if kind.endswith("restored"):
        settings = {"images": _calibration(options)}
    goal = {"target_macs": asked}
    if kind.startswith("latency"):
        goal = {"target_latency": asked, "latency_on": "onnx", "latency_threads": 1}
    started = time.process_time()
    done = pk.prune("merge", model, torch.zeros(1, 3, size, size), **settings, **goal)
    row: dict[str, Any] = {"cpu_seconds": round(time.process_time() - started, 1)}
    before, after = _fresh(model, done.model, size)
    row |= {"before_ms": before, "after_ms": after, "share": after / before}
    if kind.startswith("latency"):
        miss = row["share"] / (float(asked.rstrip("%")) / 100) - 1
        row |= {"miss": miss, "met": WITHIN[0] <= miss <= WITHIN[1], "note": done.plan.notes["latency"]}
    if kind.endswith("restored"):
        row["accuracy"] = pk.evaluate(done.model, _data(options, "test")).accuracy
    return {**row, "macs": done.after.macs / done.before.macs, "params": done.after.params / done.before.params}


def _fresh(original: nn.Module, small: nn.Module, size: int) -> list[float]:
    """Return the milliseconds of both, as processes without prunekit measure their ONNX files."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("original.onnx", "small.onnx")]
        for model, path in zip((original, small), paths, strict=True):
            pk.export(model, path, torch.zeros(1, 3, size, size), fixed_batch=1)
        command = [sys.executable, "-I", "-c", _FRESH, *paths]
        answers = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(PROCESSES)]
    return [min(times) for times in zip(*(json.loads(answer.stdout) for answer in answers), strict=True)]


def _data(options: argparse.Namespace, split: str) -> Any:
    return pk.open_data(options.data, split, input_spec=CIFAR)


def _calibration(options: argparse.Namespace) -> torch.Tensor:
    images: torch.Tensor = next(_data(options, "train").sample(1000, seed=0).batches(1000))[0]
    return images


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", required=True, help="file of the rows; those that it has are not measured again")
    parser.add_argument("--resnet56", help="the checkpoint that the authors of Neuron Merging published")
    parser.add_argument("--data", help="CIFAR-10, for accuracy at equal latency")
    return parser.parse_args()


if __name__ == "__main__":
    main()
