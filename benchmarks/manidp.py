"""ManiDP beside its controls, as a table and a JSON file.

    python benchmarks/manidp.py resnet20 --start resnet20-12fca82f.th --data path/to/cifar10 --folder runs/manidp20

Every variant (both losses, one, neither) is trained alike from the same network and
calibrated to the MACs of the static control: L1-norm pruning, restored from images, tuned with the same settings for as
long. The dynamic control keeps equally many channels of a layer for every image (Gao et al., "Dynamic Channel Pruning:
Feature Boosting and Suppression", ICLR 2019): as many as the calibrated gates keep on average, in the network trained
without either loss. Finished steps stay in the folder; the same command goes on.

The paper's rows (a GPU is wanted):

    python benchmarks/manidp.py resnet20-paper --start ... ; python benchmarks/manidp.py resnet56-paper --start ...

Speed, one thread, random weights and saliencies:

    python benchmarks/manidp.py --speed --keep 0.5 --json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import kept
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import prunekit as pk
from prunekit import ImageSet, InputSpec, TrainConfig, manidp

IMAGENET = InputSpec((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = InputSpec((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True)
class Row:
    """One experiment: the network, how everything in it is trained, and the gates."""

    arch: str
    training: TrainConfig
    recipe: manidp.GateRecipe
    input: InputSpec
    arch_args: dict[str, Any] = field(default_factory=dict)


_PAPER = TrainConfig(epochs=400, batch_size=128, lr=0.05, weight_decay=5e-4, precision="bf16")
ROWS = {
    "resnet20": Row(
        "resnet20_cifar",
        replace(_PAPER, epochs=5, precision="off"),
        manidp.GateRecipe(keep=0.65, similarity=0.1, renew=40, start="informed", gate_rate=0.01),
        IMAGENET,
    ),
    "resnet20-paper": Row("resnet20_cifar", _PAPER, manidp.GateRecipe(keep=0.65), IMAGENET),
    "resnet56-paper": Row(
        "resnet56_cifar", _PAPER, manidp.GateRecipe(keep=0.6), CIFAR, {"shortcut": "conv", "relu": "input"}
    ),
}


@dataclass(frozen=True)
class Bench:
    """What all steps share: the row, its folder, its start and its images."""

    row: Row
    folder: Path
    start: nn.Module
    train_set: ImageSet
    test_set: ImageSet

    def batches(self, data: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels."""
        return data.batches(250)

    def calibration(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Two thousand training images."""
        return self.batches(self.train_set.sample(2000, seed=0))

    def gated(self, name: str, recipe: manidp.GateRecipe) -> nn.Module:
        """The network with gates trained by `recipe`, from the folder where that is done already."""

        def gate(**run: Any) -> nn.Module:
            model = manidp.add_gates(self.start, recipe)
            manidp.train(model, recipe, self.row.training, self.train_set, **run)
            return model

        return kept(self.folder, name, gate)

    def static(self) -> nn.Module:
        """The static control, tuned."""

        def tune(**run: Any) -> nn.Module:
            images = next(self.train_set.sample(1000, seed=0).batches(1000))[0]
            small = pk.prune("merge", self.start, ratio=0.5, criterion="l1-norm", images=images).model
            pk.train(small, self.row.training, self.train_set, **run)
            return small

        return kept(self.folder, "static", tune)


def run(options: argparse.Namespace) -> None:
    """Train and measure one row."""
    row = ROWS[options.row]
    changed = {key: value for key in ("epochs", "lr") if (value := getattr(options, key)) is not None}
    row = replace(row, training=replace(row.training, **changed))
    options.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        row,
        options.folder,
        pk.load(options.start, arch=row.arch, arch_args=row.arch_args, input_spec=row.input),
        pk.open_data(options.data, "train", input_spec=row.input),
        pk.open_data(options.data, "test", input_spec=row.input),
    )
    dense = pk.evaluate(bench.start, bench.test_set)
    _store(options, [{"label": "baseline", "accuracy": dense.accuracy, "macs": dense.macs}])
    for name in options.only or [*manidp.VARIANTS, "static"]:
        if name == "static":
            found = pk.evaluate(bench.static(), bench.test_set)
            lines = [{"label": "static control", "accuracy": found.accuracy, "macs": found.macs}]
        else:
            lines = _dynamic(bench, name, options.target_macs)
        _report(options, _store(options, lines))


def _store(options: argparse.Namespace, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All results of the folder, with these in the place of what they repeat."""
    path = options.folder / "results.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    results = list({line["label"]: line for line in [*earlier, *lines]}.values())
    document = {"schema": "prunekit.bench.manidp", "version": 1, "row": options.row, "results": results}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return results


def _dynamic(bench: Bench, name: str, target: float) -> list[dict[str, Any]]:
    """A variant at the target, and for the one without losses the dynamic control as well."""
    recipe = replace(bench.row.recipe, **manidp.VARIANTS[name])
    model = bench.gated(name, recipe).eval()
    view = manidp.GatedView.of(model)
    lines = [_line(f"{name}, thresholds of training", view, bench)]
    manidp.calibrate(view, bench.calibration, target * view.cost.dense, f"{target:.0%}")
    lines.append(_line(f"{name}, calibrated", view, bench))
    if name == "neither":
        with manidp.equally_many(view, bench.calibration()):
            lines.append(_line("equally many channels for every image", view, bench))
    ahead = copy.deepcopy(model)
    manidp.foresee(ahead, torch.cat([images for images, _ in bench.calibration()]), 1.0)
    view = manidp.GatedView.of(ahead)
    manidp.calibrate(view, bench.calibration, target * view.cost.dense, f"{target:.0%}")
    lines.append(_line(f"{name}, with foresight, calibrated", view, bench))
    return lines


def _line(label: str, view: manidp.GatedView, bench: Bench) -> dict[str, Any]:
    line = manidp.measured_row(label, view, bench.test_set).to_json()
    print(json.dumps(line), flush=True)
    return line


def _report(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    table = Table(title=f"{options.row}, CIFAR-10 test images")
    for heading in ("", "accuracy", "mean MACs", "Spearman of MACs and loss"):
        table.add_column(heading, justify="left" if not heading else "right")
    for line in results:
        rank = line.get("spearman")
        table.add_row(
            line["label"],
            f"{100 * line['accuracy']:.2f}",
            f"{line['macs'] / 1e6:.2f} M",
            "" if rank is None else f"{rank:.3f}",
        )
    Console(width=120).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=sorted(ROWS), nargs="?")
    parser.add_argument("--speed", action="store_true", help="time the runtimes instead")
    parser.add_argument("--arch", default="torchvision:resnet18", help="speed: the network, with random weights")
    parser.add_argument("--keep", type=float, default=0.5, help="speed: share of each layer's channels to keep")
    parser.add_argument("--batch", type=int, default=1, help="speed: images at a time; gather takes one")
    parser.add_argument("--threads", type=int, default=1, help="speed: CPU threads")
    parser.add_argument("--timings", type=int, default=25, help="speed: timed passes of each, taken in turns")
    parser.add_argument("--json", action="store_true", help="speed: print JSON")
    parser.add_argument("--start", type=Path, help="the trained network")
    parser.add_argument("--data")
    parser.add_argument("--folder", type=Path, help="where steps and results are kept")
    parser.add_argument("--epochs", type=int, help="another length than the row's")
    parser.add_argument("--lr", type=float, help="another learning rate than the row's")
    parser.add_argument("--only", nargs="+", choices=[*manidp.VARIANTS, "static"], help="some variants alone")
    parser.add_argument("--target-macs", type=float, default=0.5, help="share of the dense MACs")
    return parser.parse_args()


def speed(options: argparse.Namespace) -> None:
    """Time the runtimes of a network with random weights and gates against the same network without gates."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = _random_gates(options.arch, options.keep)
    view = manidp.GatedView.of(model)
    images = torch.randn(64, *manidp.images_like(model, 1).shape[1:])
    manidp.add_buckets(view, images, 2)
    networks = {
        "dense": manidp.dense(copy.deepcopy(model), options.batch),
        "masked": manidp.masked(model, view.graph, options.batch),
    }
    if options.batch == 1:
        networks["gather"] = manidp.accelerate(model, "gather", view=view)[0]
    networks["buckets"] = manidp.accelerate(model, "buckets", batch=options.batch, view=view)[0]
    batch = manidp.images_like(model, options.batch)
    runs = {name: partial(network, batch) for name, network in networks.items()}
    times = pk.in_turns(runs, batch.device, rounds=options.timings)
    record = manidp.observe(view, [(images, None)])
    facts: dict[str, Any] = {"arch": options.arch, "keep": options.keep, "batch": options.batch}
    facts["macs_share"] = record.mean_macs / view.cost.dense
    facts["buckets_macs_share"] = manidp.bucketed(model).macs[0] / view.cost.dense
    for name, values in times.items():
        facts[f"{name}_ms"] = round(1e3 * statistics.median(values), 3)
        facts[f"{name}_ms_min"] = round(1e3 * min(values), 3)
    if options.json:
        print(json.dumps(facts, indent=1))
        return
    table = Table(title=f"{options.arch}, batch {options.batch}, keep {options.keep}, {options.threads} thread(s)")
    for heading in ("runtime", "median ms", "least ms", "of dense speed"):
        table.add_column(heading, justify="left" if heading == "runtime" else "right")
    for name in times:
        ratio = facts["dense_ms"] / facts[f"{name}_ms"]
        table.add_row(name, str(facts[f"{name}_ms"]), str(facts[f"{name}_ms_min"]), f"{ratio:.2f}")
    Console(width=100).print(table)


def _random_gates(arch: str, keep: float) -> nn.Module:
    """A network with random weights, batch norms and gates, and thresholds by which images keep a share of channels."""
    model = manidp.add_gates(pk.load(arch), manidp.GateRecipe())
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.2, 0.6)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)

    def set_threshold(_: nn.Module, __: Any, pi: Tensor, *, layer: manidp.GatedConv) -> None:
        layer.threshold.copy_(pi.flatten().quantile(1 - keep))

    hooks = []
    for _, layer in manidp.gated_layers(model):
        nn.init.normal_(layer.gate.excite.weight, 0, 0.5)
        nn.init.uniform_(layer.gate.excite.bias, 0.2, 0.8)
        hooks.append(layer.gate.register_forward_hook(partial(set_threshold, layer=layer)))
    with torch.no_grad():
        model(manidp.images_like(model, 16))
    for hook in hooks:
        hook.remove()
    return model


if __name__ == "__main__":
    chosen = _options()
    if chosen.speed:
        speed(chosen)
    else:
        run(chosen)
