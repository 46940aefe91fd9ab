"""Accuracy against ratio for every way of pruning and compensating a network, as a table and a JSON file.

The paper's own table (Neuron Merging, NeurIPS 2020, ResNet-56 on CIFAR-10), with its authors' checkpoint:

    python benchmarks/merging.py ResNet.cifar10.original.56.pth.tar --arch resnet56_cifar \
        --arch-args shortcut=conv,relu=input --data path/to/cifar10 --json merging.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import prunekit as pk
from prunekit.models import parse_args


def main() -> None:
    """Measure every combination on the whole test split."""
    options = _options()
    model = pk.load(options.model, arch=options.arch, arch_args=parse_args(options.arch_args))
    data = pk.open_data(options.data, "test", root=options.data_root)
    whole = pk.evaluate(model, data)
    rows: list[dict[str, Any]] = []
    for criterion in options.criteria.split(","):
        for restore in options.restore.split(","):
            for ratio in map(float, options.ratios.split(",")):
                rows.append(_measure(model, data, criterion, restore, ratio))
                print(json.dumps(rows[-1]), flush=True)
    Console(width=120).print(_table(rows, whole.accuracy or 0.0))
    if options.json:
        document = {"schema": "prunekit.bench.merging", "version": 1, "accuracy": whole.accuracy, "rows": rows}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _measure(model: Any, data: Any, criterion: str, restore: str, ratio: float) -> dict[str, Any]:
    started = time.perf_counter()
    result = pk.prune("merge", model, criterion=criterion, restore=restore, ratio=ratio)
    seconds = time.perf_counter() - started
    score = pk.evaluate(result.model, data)
    return {
        "criterion": criterion,
        "restore": restore,
        "ratio": ratio,
        "accuracy": score.accuracy,
        "params": result.after.params,
        "macs": result.after.macs,
        "merged": result.plan.notes["merged"],
        "negative_scales": result.plan.notes["negative_scales"],
        "prune_seconds": round(result.seconds, 3),
        "with_proof_seconds": round(seconds, 3),
    }


def _table(rows: list[dict[str, Any]], whole: float) -> Table:
    ratios = sorted({row["ratio"] for row in rows})
    table = Table(title=f"test accuracy in percent; {100 * whole:.2f} before")
    table.add_column("criterion")
    table.add_column("restore")
    for ratio in ratios:
        table.add_column(f"{ratio:g}", justify="right")
    ways = dict.fromkeys((row["criterion"], row["restore"]) for row in rows)
    for criterion, restore in ways:
        found = {r["ratio"]: r for r in rows if (r["criterion"], r["restore"]) == (criterion, restore)}
        table.add_row(criterion, restore, *(f"{100 * found[r]['accuracy']:.2f}" if r in found else "" for r in ratios))
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("--arch", help="what it is, where the file does not say")
    parser.add_argument("--arch-args", default="")
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-root")
    parser.add_argument("--criteria", default="l1-norm,l2-norm,l2-GM")
    parser.add_argument("--restore", default="none,paper")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4,0.5,0.6")
    parser.add_argument("--json", help="write the rows there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
