"""Accuracy against ratio for every way of pruning and restoring a network, as a table, a JSON file and a picture.

The paper's network (Neuron Merging, NeurIPS 2020, ResNet-56 on CIFAR-10), with its authors' checkpoint:

    python benchmarks/merging.py ResNet.cifar10.original.56.pth.tar --arch resnet56_cifar \
        --arch-args shortcut=conv,relu=input --data path/to/cifar10 --json merging.json --picture merging.png

A way is `restore` or `restore:criterion`, with the method's own criterion where none is said: `none`, `paper`,
`moments`, `synthetic`, `calibrate`, and from `baselines.py` `lbyl` and `folding`. Only `calibrate` sees images: 1,000
training images, without their labels. Finished rows are read back from the JSON file and not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import baselines
from rich.console import Console
from rich.table import Table

import prunekit as pk


def main() -> None:
    """Measure every combination on the whole test split."""
    options = _options()
    model = pk.load(options.model, arch=options.arch, arch_args=pk.models.parse_args(options.arch_args))
    spec = _spec(model, options)
    data = pk.open_data(options.data, "test", root=options.data_root, input_spec=spec)
    images = _calibration(options, spec) if "calibrate" in options.ways else None
    document = _started(options, model, data)
    for seed in range(options.seeds):
        for way in options.ways.split(","):
            for ratio in map(float, options.ratios.split(",")):
                _measure_once(document, model, data, images, way, ratio, seed)
                if options.json:
                    Path(options.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    Console(width=120).print(_table(document["rows"], document["accuracy"]))
    if options.picture:
        _draw(document, Path(options.picture))


def _spec(model: Any, options: argparse.Namespace) -> Any:
    """How images are prepared: as said, or as the network remembers."""
    if not options.mean:
        return None
    shape = pk.inspect(model).graph.example_shapes[0][1:]
    mean, std = (tuple(map(float, text.split(","))) for text in (options.mean, options.std))
    return pk.InputSpec(shape, mean, std)


def _calibration(options: argparse.Namespace, spec: Any) -> Any:
    train = pk.open_data(options.data, "train", root=options.data_root, input_spec=spec)
    chosen = train.sample(1000, seed=0)
    return next(chosen.batches(len(chosen)))[0]


def _started(options: argparse.Namespace, model: Any, data: Any) -> dict[str, Any]:
    if options.json and Path(options.json).exists():
        found: dict[str, Any] = json.loads(Path(options.json).read_text(encoding="utf-8"))
        if found.get("version") == 2:
            return found
    whole = pk.evaluate(model, data).accuracy
    return {"schema": "prunekit.bench.merging", "version": 2, "accuracy": whole, "rows": []}


def _measure_once(
    document: dict[str, Any], model: Any, data: Any, images: Any, way: str, ratio: float, seed: int
) -> None:
    restore, _, criterion = way.partition(":")
    seeded = restore in ("synthetic", "folding")
    if seed and not seeded:
        return
    key = {"way": way, "ratio": ratio, "seed": seed}
    if any(all(row[name] == value for name, value in key.items()) for row in document["rows"]):
        return
    _reset_peak()
    before, started, worked = _peak(), time.perf_counter(), time.process_time()
    small, plan = _pruned(model, restore, criterion, ratio, seed, images if restore == "calibrate" else None)
    row = {
        **key,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - worked, 2),
        "peak_mb": round(_peak() - before),
    }
    score = pk.evaluate(small, data)
    row |= {"accuracy": score.accuracy, "params": score.params, "macs": score.macs, "notes": _notes(plan)}
    document["rows"].append(row)
    print(json.dumps(row), flush=True)


def _pruned(model: Any, restore: str, criterion: str, ratio: float, seed: int, images: Any) -> tuple[Any, Any]:
    settings: dict[str, Any] = {"ratio": ratio, **({"criterion": criterion} if criterion else {})}
    if restore in ("lbyl", "folding"):
        chosen = pk.prune("merge", model, restore="none", **{"criterion": "l2-norm", **settings})
        keeps = {keep.group: list(keep.index) for keep in chosen.plan.keeps}
        if restore == "lbyl":
            plan = baselines.lbyl(model, chosen.graph, keeps)
        else:
            plan = baselines.folding(model, chosen.graph, keeps, seed)
        return pk.apply(model, plan), plan
    if restore == "synthetic":
        settings["seed"] = seed
    result = pk.prune("merge", model, restore=restore, images=images, **settings)
    return result.model, result.plan


def _notes(plan: Any) -> dict[str, Any]:
    return {key: plan.notes[key] for key in ("criterion", "widths", "merged", "negative_scales") if key in plan.notes}


def _reset_peak() -> None:
    """Let the kernel count the peak of this process's memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> float:
    """The peak of this process's memory, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _by_way(rows: list[dict[str, Any]]) -> dict[str, dict[float, list[float]]]:
    """Accuracies in percent, one for each seed, by way and ratio."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        found.setdefault(row["way"], {}).setdefault(row["ratio"], []).append(100 * row["accuracy"])
    return found


def _table(rows: list[dict[str, Any]], whole: float) -> Table:
    ratios = sorted({row["ratio"] for row in rows})
    table = Table(title=f"test accuracy in percent, mean over seeds; {100 * whole:.2f} before")
    table.add_column("way")
    for ratio in ratios:
        table.add_column(f"{ratio:g}", justify="right")
    for way, found in _by_way(rows).items():
        cells = [f"{sum(found[r]) / len(found[r]):.2f}" if r in found else "" for r in ratios]
        table.add_row(way, *cells)
    return table


def _draw(document: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for way, found in _by_way(document["rows"]).items():
        ratios = sorted(found)
        axes.plot(ratios, [sum(found[r]) / len(found[r]) for r in ratios], marker="o", label=way)
    axes.axhline(100 * document["accuracy"], color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="share of channels removed", ylabel="test accuracy, %")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("--arch", help="what it is, where the file does not say")
    parser.add_argument("--arch-args", default="")
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-root")
    parser.add_argument("--mean", default="", help="of the images the network was trained on, where not the data set's")
    parser.add_argument("--std", default="")
    parser.add_argument("--ways", default="none,paper,lbyl,folding,moments,synthetic,calibrate")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4,0.5,0.6")
    parser.add_argument("--seeds", type=int, default=1, help="how often what depends on a seed is measured")
    parser.add_argument("--json", help="write the rows there, and read finished ones from there")
    parser.add_argument("--picture", help="draw them there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
