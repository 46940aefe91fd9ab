"""Network Slimming end to end: sparsity training, pruning, restoration, tuning, as a table and a JSON file.

The paper's rows on CIFAR-10 (a GPU is wanted; 160 epochs of each training):

    python benchmarks/slimming.py vgg19 --data path/to/cifar10 --folder runs/vgg19
    python benchmarks/slimming.py resnet164 --data path/to/cifar10 --folder runs/resnet164
    python benchmarks/slimming.py densenet40 --data path/to/cifar10 --folder runs/densenet40

A row for two CPU cores, from a trained ResNet-20, with plain L1-norm pruning at equal MACs and equal tuning beside it:

    python benchmarks/slimming.py resnet20 --start resnet20-12fca82f.th --data path/to/cifar10 --folder runs/resnet20

Every finished step is kept in the folder; the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import kept

import prunekit as pk
from prunekit import ImageSet, InputSpec, TrainConfig, models, train

IMAGENET = InputSpec((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Row:
    """One experiment: what is trained how, and the amounts that are pruned.

    `l1_control` is the amount at which plain L1-norm pruning, whose uniform widths come in coarse steps, has at least
    as many MACs left.
    """

    arch: str
    sparsity: float
    amounts: tuple[dict[str, Any], ...]
    training: dict[str, Any]
    tuning: dict[str, Any]
    arch_args: dict[str, Any] = field(default_factory=dict)
    input: InputSpec | None = None
    scope: str = "all"
    l1_control: dict[str, Any] | None = None


_PAPER: dict[str, Any] = {"epochs": 160, "batch_size": 64, "lr": 0.1, "schedule": "step", "weight_decay": 1e-4}
_SHORT: dict[str, Any] = {"batch_size": 128, "weight_decay": 1e-4}

ROWS = {
    "vgg19": Row("vgg19_cifar", 1e-4, ({"ratio": 0.7},), _PAPER, _PAPER),
    "resnet164": Row("preresnet164", 1e-5, ({"ratio": 0.4}, {"ratio": 0.6}), _PAPER, _PAPER),
    "densenet40": Row("densenet40_12", 1e-5, ({"ratio": 0.4}, {"ratio": 0.6}), _PAPER, _PAPER),
    "resnet20": Row(
        "resnet20_cifar",
        1e-2,
        ({"target_macs": "50%"},),
        {**_SHORT, "epochs": 3, "lr": 0.05},
        {**_SHORT, "epochs": 2, "lr": 0.01},
        input=IMAGENET,
        scope="inner",
        l1_control={"ratio": 0.5},
    ),
}

# How the network is restored. Constants go into running means, which tuning estimates anew: that tunes to the very
# weights that dropping does, and is not done twice.
WAYS = {"dropped": "none", "constants absorbed": "constants", "least squares": "calibrate"}
TUNED_AS = {"constants absorbed": "dropped"}


@dataclass(frozen=True)
class Bench:
    """The images and the folder that all steps of a run share."""

    folder: Path
    train_set: ImageSet
    test_set: ImageSet

    def accuracy(self, model: torch.nn.Module) -> float:
        """Test accuracy from 0 to 1."""
        return pk.evaluate(model, self.test_set).accuracy or 0.0

    def trained(self, name: str, model: torch.nn.Module, settings: dict[str, Any]) -> torch.nn.Module:
        """`model` after training, from the folder where that is done already."""

        def fit(**run: Any) -> torch.nn.Module:
            train(model, TrainConfig(**settings), self.train_set, **run)
            return model

        return kept(self.folder, name, fit)


def main() -> None:
    """Run one row and report it."""
    options = _options()
    row = ROWS[options.row]
    options.folder.mkdir(parents=True, exist_ok=True)
    start = _start(row, options.start)
    spec = row.input or models.default_input(row.arch, row.arch_args)
    bench = Bench(
        options.folder,
        pk.open_data(options.data, "train", root=options.data_root, input_spec=spec),
        pk.open_data(options.data, "test", root=options.data_root, input_spec=spec),
    )
    results = [_line("baseline", start, bench)] if options.start else []
    sparse = bench.trained(
        "sparse", _start(row, options.start), {**row.training, "sparsity": row.sparsity, "sparsity_scope": row.scope}
    )
    results.append(_line("sparse", sparse, bench))
    calibration = next(bench.train_set.sample(1000, seed=0).batches(1000))[0]
    for amount in row.amounts:
        for way, restore in WAYS.items():
            label, tuned = (f"slim {_said(amount)}, {name}" for name in (way, TUNED_AS.get(way, way)))
            images = calibration if restore == "calibrate" else None
            settings = {**amount, "restore": restore, "scope": row.scope}
            results.append(_pruned(label, "slim", sparse, settings, images, row, bench, tuned))
    if row.l1_control:
        settings = {**row.l1_control, "restore": "none", "criterion": "l1-norm"}
        label = f"L1 norm {_said(row.l1_control)} of the baseline"
        results.append(_pruned(label, "merge", start, settings, None, row, bench))
    _report(options, results)


def _start(row: Row, checkpoint: Path | None) -> torch.nn.Module:
    if checkpoint is not None:
        return pk.load(checkpoint, arch=row.arch, arch_args=row.arch_args, input_spec=row.input)
    torch.manual_seed(0)
    return models.build(row.arch, row.arch_args)


def _pruned(
    label: str,
    method: str,
    model: torch.nn.Module,
    settings: dict[str, Any],
    images: torch.Tensor | None,
    row: Row,
    bench: Bench,
    tuned_as: str | None = None,
) -> dict[str, Any]:
    result = pk.prune(method, model, images=images, **settings)
    before = bench.accuracy(result.model)
    name = "".join(c if c.isalnum() else "-" for c in tuned_as or label)
    tuned = bench.trained(f"tuned-{name}", result.model, row.tuning)
    return {**_line(label, tuned, bench), "accuracy_pruned": before, "seconds": round(result.seconds, 2)}


def _line(label: str, model: torch.nn.Module, bench: Bench) -> dict[str, Any]:
    cost = pk.inspect(model).cost
    line = {"label": label, "accuracy": bench.accuracy(model), **cost.to_json()}
    print(json.dumps(line), flush=True)
    return line


def _said(amount: dict[str, Any]) -> str:
    return " ".join(f"{key} {value}" for key, value in amount.items())


def _report(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    table = Table(title=f"{options.row}, CIFAR-10 test accuracy in percent")
    for heading in ("", "after pruning", "after tuning", "parameters", "MACs"):
        table.add_column(heading, justify="left" if not heading else "right")
    for line in results:
        pruned = line.get("accuracy_pruned")
        first = "" if pruned is None else f"{100 * pruned:.2f}"
        table.add_row(line["label"], first, f"{100 * line['accuracy']:.2f}", f"{line['params']:,}", f"{line['macs']:,}")
    Console(width=120).print(table)
    document = {"schema": "prunekit.bench.slimming", "version": 1, "row": options.row, "results": results}
    (options.folder / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=sorted(ROWS))
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-root")
    parser.add_argument("--folder", type=Path, required=True, help="where steps and results are kept")
    parser.add_argument("--start", type=Path, help="a checkpoint to start from instead of training from scratch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
