"""What healing without labels and tuning with them bring back, as rows of a JSON file and a table.

    python benchmarks/healing.py resnet20-12fca82f.th --arch resnet20_cifar --mean .485,.456,.406 --std .229,.224,.225 \
        --data path/to/cifar10 --json healing.json --ways restored,healed:60 --images 1000

A network is pruned and restored by `merge`, from that many unlabelled training images (`--images`, as many a class as
the others; 0: from images that are made, on which nothing heals). A way is then `restored`, or one of these with
its epochs:

- `healed:60` heals on the same images, without their labels;
- `tuned:2` tunes on all labelled training images by the default recipe, as the command does; `answers:2` does without
  the blocks (plain distillation), `labels:2` without a teacher.

The rows that take hours:

    python benchmarks/healing.py resnet20-12fca82f.th --arch resnet20_cifar --mean .485,.456,.406 --std .229,.224,.225 \
        --data path/to/cifar10 --json healing.json --target-macs 50% --ways tuned:10,answers:10,labels:10 --seeds 3

Everything is scored on all test images. A file that exists is gone on with; a way that was stopped, from its state
beside the file.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import prunekit as pk

TUNED: dict[str, tuple[str, ...]] = {"tuned": (), "answers": ("--match", "0"), "labels": ("--distill-share", "0")}


def main() -> None:
    """Make the rows that the file lacks, and show all."""
    options = _options()
    path = Path(options.json)
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"schema": "prunekit.bench.healing"}
    rows: list[dict[str, Any]] = document.setdefault("rows", [])
    bench = Bench(options)
    for seed in range(options.seeds):
        for count in map(int, options.images.split(",")):
            for way in options.ways.split(","):
                key = {"network": Path(options.model).name, **bench.budget, "images": count, "way": way, "seed": seed}
                if not any(key.items() <= row.items() for row in rows):
                    rows.append({**key, **bench.row(way, count, seed)})
                    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    Console(width=120).print(_table(rows))


class Bench:
    """The network and the images of all rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        mean, std = (tuple(map(float, text.split(","))) for text in (options.mean, options.std))
        arguments = pk.models.parse_args(options.arch_args) if options.arch_args else None
        spec = pk.InputSpec((3, 32, 32), mean, std)
        self.options = options
        self.model = pk.load(options.model, arch=options.arch, arch_args=arguments, input_spec=spec).eval()
        self.train, self.test = (pk.open_data(options.data, split, input_spec=spec) for split in ("train", "test"))
        self.budget = {"target_macs": options.target_macs} if options.target_macs else {"ratio": options.ratio}

    def row(self, way: str, count: int, seed: int) -> dict[str, Any]:
        """Return what one way came to; the seconds are those of the processor, without pruning where it heals."""
        name, _, epochs = way.partition(":")
        row = self._tuned(name, epochs, count, seed) if name in TUNED else self._healed(name, epochs, count, seed)
        print(json.dumps({"way": way, "images": count, "seed": seed, **row}), flush=True)
        return row

    def _healed(self, name: str, epochs: str, count: int, seed: int) -> dict[str, Any]:
        chosen = _alike(self.train, count, seed) if count else None
        restore = {"images": chosen.inputs()} if chosen is not None else {"restore": "synthetic", "seed": seed}
        pruned, more = pk.merge(self.model, **self.budget, **restore).model, {}
        started = time.process_time()
        if name != "restored":
            if chosen is None:
                raise SystemExit("healing needs images: --images 0 goes with restored alone")
            state = self._beside(name, epochs, count, seed)
            config = pk.HealConfig(seconds=1e6, epochs=int(epochs), seed=seed, device="cpu")
            done = pk.heal(pruned, self.model, chosen, config, state_path=state, resume=state.exists())
            state.unlink(missing_ok=True)
            pruned, more = done.model, {"agreement": [done.before, done.after], "stopped": done.stopped}
        seconds = round(time.process_time() - started, 1)
        return {"accuracy": pk.evaluate(pruned, self.test).accuracy, "seconds": seconds, **more}

    def _tuned(self, name: str, epochs: str, count: int, seed: int) -> dict[str, Any]:
        """Run the command, which prunes, tunes and scores, and goes on with what it finds."""
        options, target = self.options, self._beside(name, epochs, count, seed).with_suffix(".pt")
        reading = {"arch": options.arch, "arch-args": options.arch_args, "mean": options.mean, "std": options.std}
        (budget, amount), *_ = self.budget.items()
        flags = {**reading, "data": options.data, budget.replace("_", "-"): amount, "epochs": epochs, "seed": seed}
        flags |= {"calibration": count, "output": target}
        typed = [part for flag, value in flags.items() if value is not None for part in (f"--{flag}", str(value))]
        resume = ["--resume"] if target.with_suffix(".steps").exists() else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "prunekit", "merge", options.model, *typed, *TUNED[name], "--json", "--force"]
        said = subprocess.run([*command, *resume], check=True, stdout=subprocess.PIPE).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = json.loads(said)["passes"][-1]
        seconds = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
        figures = {"accuracy": done["accuracy_tuned"], "accuracy_restored": done["accuracy_pruned"]}
        return {**figures, "seconds": seconds, "kept": done["kept"]}

    def _beside(self, name: str, epochs: str, count: int, seed: int) -> Path:
        """Return the file of a way's state, beside that of the rows."""
        path = Path(self.options.json)
        return path.with_name(f"{path.stem}-{name}-{epochs}-{count}-{seed}.state")


def _alike(data: pk.ImageSet, count: int, seed: int) -> pk.ImageSet:
    """Return `count` images, as many of each class, drawn by `seed`."""
    each = max(1, count // len(data.classes))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    labels = data.labels[order]
    return data.subset(torch.cat([order[labels == number][:each] for number in range(len(data.classes))]))


def _table(rows: list[dict[str, Any]]) -> Table:
    """Return the mean and spread over the seeds of each way."""
    table = Table(title="test accuracy in percent")
    for heading in ("network", "way", "images", "accuracy", "seconds"):
        table.add_column(heading, justify="left" if heading in ("network", "way") else "right")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        budget = row.get("target_macs") or row.get("ratio")
        groups.setdefault((f"{row['network']} {budget}", row["way"], row["images"]), []).append(row)
    for (network, way, images), found in groups.items():
        values = torch.tensor([100 * row["accuracy"] for row in found])
        spread = f" ± {float(values.std()):.2f}" if len(found) > 1 else ""
        seconds = sum(row["seconds"] for row in found) / len(found)
        table.add_row(network, way, f"{images:,}", f"{float(values.mean()):.2f}{spread}", f"{seconds:.0f}")
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--arch", required=True)
    parser.add_argument("--arch-args")
    parser.add_argument("--mean", default=".4914,.4822,.4465")
    parser.add_argument("--std", default=".2023,.1994,.2010")
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", required=True, help="the rows; a file that exists is gone on with")
    parser.add_argument("--ways", default="restored,healed:60")
    parser.add_argument("--images", default="1000", help="numbers of images to restore from and to heal on")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--target-macs")
    parser.add_argument("--seeds", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
