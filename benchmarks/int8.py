"""The last factor of two: a network as it is, pruned and restored, in int8, and both; in ONNX Runtime, on one thread.

    python benchmarks/int8.py resnet56 --checkpoint ResNet.cifar10.original.56.pth.tar --data cifar10
    python benchmarks/int8.py resnet56 … --threads 2

`--data` is a folder with `train` and `test`. Restoration and ranges come from training images; layers that stay in
float are chosen on others of them; test images are read once, at the end. What is done stays in the file of `--json`,
so that the same command goes on. Latency: one image; files take turns, and the best pass of each counts: its processor
time on one thread, wall time on several.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import prunekit as pk
from prunekit.exporting.int8 import quantised, scores
from prunekit.exporting.runtimes import OnnxModel

CIFAR = pk.InputSpec((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CALIBRATION, VALIDATION = 1000, 5000
ROWS = ("dense", "pruned", "int8", "pruned, int8")


def resnet56(checkpoint: str) -> nn.Module:
    arguments = {"shortcut": "conv", "relu": "input"}
    return pk.load(checkpoint, arch="resnet56_cifar", arch_args=arguments, input_spec=CIFAR)


def efficientnet_lite0(checkpoint: str) -> nn.Module:
    """Its code is a package of others, its weights theirs; images of 224 pixels."""
    spec = pk.InputSpec((3, 224, 224), (0.498,) * 3, (0.502,) * 3)
    return pk.load(checkpoint, arch="efficientnet_lite_pytorch:EfficientNet.from_name", input_spec=spec)


NETWORKS: dict[str, Callable[[str], nn.Module]] = {"resnet56": resnet56, "efficientnet-lite0": efficientnet_lite0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--round-to", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=200)
    parser.add_argument("--files", type=Path, default=Path("int8-files"))
    parser.add_argument("--json", type=Path, default=Path("int8.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.files.mkdir(exist_ok=True)
    done: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    for row in ROWS:
        if row not in done:
            done[row] = made(row, args)
            args.json.write_text(json.dumps(done, indent=1))
            print(row, done[row], flush=True)
    for row in ROWS:
        if "accuracy" not in done[row]:
            done[row]["accuracy"] = tested(row, args)
            args.json.write_text(json.dumps(done, indent=1))
    for row, took in timed(args).items():
        done[row][f"ms, {args.threads} threads"] = took
    args.json.write_text(json.dumps(done, indent=1))
    base = done["dense"]
    for row, facts in done.items():
        took = facts[f"ms, {args.threads} threads"]
        faster = base[f"ms, {args.threads} threads"] / took
        print(f"{row:14} {facts['accuracy']:8.2%} {facts['bytes']:10,} {took:8.2f} ms {faster:6.2f}x", flush=True)


def file_of(row: str, args: argparse.Namespace) -> Path:
    return Path(args.files / f"{args.network}-{row.replace(', ', '-')}.onnx")


def made(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Write the file of a row; what is known of it without test images."""
    model, target = NETWORKS[args.network](args.checkpoint), file_of(row, args)
    train_set = pk.open_data(args.data, "train", input_spec=CIFAR if args.network == "resnet56" else None, lazy=True)
    chosen = train_set.sample(CALIBRATION + VALIDATION, seed=0)
    images = chosen.subset(range(CALIBRATION)).inputs()
    facts: dict[str, Any] = {}
    if row == "pruned":
        done = pk.merge(model, images=images, ratio=args.ratio, round_to=args.round_to)
        model, facts = done.model, {"macs": done.after.macs, "params": done.after.params}
    if row in ("dense", "pruned"):
        written = pk.export(model, target, force=True)
        return {**facts, "bytes": written.size}
    source = file_of("pruned" if "pruned" in row else "dense", args).read_bytes()
    validation = chosen.subset(range(CALIBRATION, CALIBRATION + VALIDATION))
    found = quantised(source, images[:500], lambda: validation.batches(250), max_drop=0.005)
    target.write_bytes(found.content)
    return {"bytes": len(found.content), "validation": found.to_json()}


def tested(row: str, args: argparse.Namespace) -> float:
    """The accuracy on the test images."""
    images = pk.open_data(args.data, "test", input_spec=CIFAR if args.network == "resnet56" else None)
    model, right = OnnxModel(str(file_of(row, args))), 0
    for batch, labels in images.batches(250):
        right += int((scores(model(batch)).argmax(1) == labels).sum())
    return right / len(images)


def timed(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the best pass of each file."""
    models = {row: OnnxModel(str(file_of(row, args))) for row in ROWS}
    read = time.process_time if args.threads == 1 else time.perf_counter
    size = models["dense"].signature()[1][1:]
    x = torch.randn(1, *[int(str(side)) for side in size], generator=torch.Generator().manual_seed(0))
    best = dict.fromkeys(ROWS, float("inf"))
    for _ in range(args.passes):
        for row, model in models.items():
            model(x)
            began = read()
            model(x)
            best[row] = min(best[row], read() - began)
    return {row: 1e3 * seconds for row, seconds in best.items()}


if __name__ == "__main__":
    main()
