"""The last factor of two: a network as it is, pruned and restored, in int8, and both; in ONNX Runtime.

    python benchmarks/int8.py ResNet.cifar10.original.56.pth.tar --arch resnet56_cifar \
        --arch-args shortcut=conv,relu=input --data path/to/cifar10 --threads 1

`--data` is a folder with `train` and `test`. Everything is done by prunekit: restoration and ranges come from
training images, layers that stay in float are chosen on others of them, and test images are read once for each file.
What is done stays in the file of `--json`, so that the same command goes on. Latency: one image; files take turns, and
the best pass of each counts: its processor time on one thread, wall time on several.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

ROWS = ("dense", "pruned")


def main() -> None:
    """Make what the file lacks, time all files, and print a table."""
    args = _options()
    args.files.mkdir(exist_ok=True)
    done: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    for name in ROWS:
        if name not in done:
            done |= made(name, args)
            args.json.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    key = f"ms, {args.threads} threads"
    for name, took in timed(list(done), args).items():
        done[name][key] = took
    args.json.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    for name, facts in done.items():
        faster = done["dense"][key] / facts[key]
        print(f"{name:14} {facts['accuracy']:8.2%} {facts['bytes']:10,} {facts[key]:8.2f} ms {faster:6.2f}x")


def made(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Write a network and its two ONNX files; return the rows of both files."""
    network, data = args.files / f"{name}.pt", ("--data", args.data)
    known: dict[str, Any] = {}
    if name == "dense":
        said = {"--arch": args.arch, "--arch-args": args.arch_args, "--mean": args.mean, "--std": args.std}
        words = [word for flag, value in said.items() if value for word in (flag, value)]
        prunekit("convert", args.model, *words, "-o", network, "--force")
    else:
        settings = ("--ratio", args.ratio, "--round-to", args.round_to)
        found = prunekit("merge", args.files / "dense.pt", *data, *settings, "-o", network, "--force")
        known = {key: found["after"][key] for key in ("macs", "params")}
    plain = prunekit("export", network, "-o", args.files / f"{name}.onnx", "--force", "--no-latency")
    small = prunekit(
        "export", network, *data, "--int8", "-o", args.files / f"{name}-int8.onnx", "--force", "--no-latency"
    )
    return {
        name: {**known, "accuracy": small["parity"]["exported_accuracy"], "bytes": plain["bytes"]},
        f"{name}, int8": small["int8"],
    }


def prunekit(*words: Any) -> dict[str, Any]:
    """Run a command, and return its JSON document."""
    command = [sys.executable, "-m", "prunekit", *map(str, words), "--json", "--quiet"]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def timed(names: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds of the best pass of each file."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = args.threads
    files = {name: args.files / f"{name.replace(', ', '-')}.onnx" for name in names}
    sessions = {name: onnxruntime.InferenceSession(file, settings) for name, file in files.items()}
    clock = time.process_time if args.threads == 1 else time.perf_counter
    best = dict.fromkeys(names, float("inf"))
    for _ in range(args.passes):
        for name, session in sessions.items():
            (read,) = session.get_inputs()
            x = {read.name: np.ones([side if isinstance(side, int) else 1 for side in read.shape], np.float32)}
            session.run(None, x)
            began = clock()
            session.run(None, x)
            best[name] = min(best[name], clock() - began)
    return {name: 1e3 * seconds for name, seconds in best.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint")
    for name in ("--arch", "--arch-args", "--mean", "--std"):
        parser.add_argument(name)
    parser.add_argument("--data", required=True)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--round-to", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=300)
    parser.add_argument("--files", type=Path, default=Path("int8-files"))
    parser.add_argument("--json", type=Path, default=Path("int8.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
