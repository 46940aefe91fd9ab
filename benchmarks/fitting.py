"""How small a network becomes within a drop of accuracy, and whether the drop holds on images that did not decide.

The test images are halved anew for every seed, each class alike: one half decides, the other half tells the true drop.
Restoration reads unlabelled training images; nothing is tuned.

    python benchmarks/fitting.py ResNet.cifar10.original.56.pth.tar --arch resnet56_cifar \
        --arch-args shortcut=conv,relu=input --data path/to/cifar10 --max-drop 1% --seeds 10 --json fitting.json

A file that exists is gone on with: seeds and networks that it has are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import prunekit as pk


def main() -> None:
    """Fit once for each seed that the file lacks, and show all."""
    options = _options()
    model = pk.load(options.model, arch=options.arch, arch_args=pk.models.parse_args(options.arch_args)).eval()
    mean, std = (tuple(map(float, text.split(","))) for text in (options.mean, options.std))
    spec = pk.InputSpec((3, 32, 32), mean, std)
    train, test = (pk.open_data(options.data, split, input_spec=spec) for split in ("train", "test"))
    goal, path = pk.DropGoal.parse(options.max_drop, options.confidence), Path(options.json)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"schema": "prunekit.bench.fitting"}
    rows: list[dict[str, Any]] = found.setdefault("rows", [])
    for seed in range(options.seeds):
        key = {"network": Path(options.model).name, **goal.to_json(), "calibration": options.calibration, "seed": seed}
        key["ways"] = options.methods
        if not any(key.items() <= row.items() for row in rows):
            rows.append({**key, **_fitted(model, train, test, goal, options.methods, options.calibration, seed)})
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console(width=120).print(_table(rows))


def _way(text: str) -> pk.Variant:
    """Read a method with settings, `merge:widths=measured:restore=calibrate`."""
    method, *settings = text.split(":")
    return pk.Variant(method, dict(setting.split("=") for setting in settings))


def _fitted(
    model: torch.nn.Module,
    train: pk.ImageSet,
    test: pk.ImageSet,
    goal: pk.DropGoal,
    methods: str,
    calibration: int,
    seed: int,
) -> dict[str, Any]:
    """Fit with one seed; the seconds are those of the processor, for the search alone."""
    decide, report = _halves(test, seed)
    started, wall = time.process_time(), time.perf_counter()
    ways = [_way(text) for text in methods.split(",")]
    fitted = pk.fit(model, decide, goal, train_set=train, ways=ways, calibration=calibration, seed=seed)
    seconds, wall = time.process_time() - started, time.perf_counter() - wall
    before, after = (pk.evaluate(one, report).accuracy or 0.0 for one in (model, fitted.model))
    assert fitted.trial.cost is not None
    assert fitted.trial.drop is not None
    return {
        "way": fitted.trial.way,
        "macs": fitted.trial.cost.macs / fitted.before.macs,
        "params": fitted.trial.cost.params / fitted.before.params,
        "decided": fitted.trial.drop.share,
        "bound": fitted.trial.bound,
        "drop": before - after,
        "images": [len(decide), len(report)],
        "seconds": seconds,
        "wall": wall,
        "trials": [[t.way, t.share, t.bound, t.seconds] for t in fitted.history],
    }


def _halves(images: pk.ImageSet, seed: int) -> tuple[pk.ImageSet, pk.ImageSet]:
    """Two halves, drawn by `seed`, with the same share of each class."""
    mixed = images.sample(len(images), seed=seed)
    order = torch.argsort(mixed.labels, stable=True)
    return mixed.subset(order[::2]), mixed.subset(order[1::2])


def _table(rows: list[dict[str, Any]]) -> Table:
    names = ("network", "seed", "way", "MACs", "parameters", "drop, decided", "at most", "true drop", "trials", "CPU")
    table = Table(*names)
    for row in rows:
        shares = [f"{100 * row[key]:.2f} %" for key in ("macs", "params", "decided", "bound", "drop")]
        counts = (str(len(row["trials"])), f"{row['seconds']:.0f} s")
        table.add_row(row["network"][:20], str(row["seed"]), row["way"], *shares, *counts)
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--arch")
    parser.add_argument("--arch-args", default="")
    parser.add_argument("--data", required=True, help="a folder with train/ and test/")
    parser.add_argument("--mean", default=".4914,.4822,.4465")
    parser.add_argument("--std", default=".2023,.1994,.2010")
    parser.add_argument("--max-drop", default="1%")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--methods", default="merge:widths=measured,slim")
    parser.add_argument("--calibration", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", default="benchmarks/results/fitting.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
