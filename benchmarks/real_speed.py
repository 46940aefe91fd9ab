"""Does the clock show what the MACs promise? ResNet-50, ResNet-18 and MobileNetV2 at 224, half and a quarter left.

    python benchmarks/real_speed.py --json real_speed.json

Channels go by L2 norm, the same share of each group, in widths that are multiples of 8. Each network runs as saved,
with batch norms folded into the convolutions, folded with channels last, and exported to ONNX Runtime (which folds and
lays out by itself), on one thread. Repetitions of all networks alternate, and the fastest of each counts. What is shown
is the share of the MACs reduction that arrives: (1 - time after / time before) / (1 - MACs after / MACs before), before
and after run in the same way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from surgery import half_of_each_group
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import prunekit as pk
from prunekit import surgery

MODELS = ("resnet18", "mobilenet_v2", "resnet50")
WAYS = ("as saved", "folded", "folded, channels last", "ONNX Runtime")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("real_speed.json"))
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--batches", nargs="*", type=int, default=(1, 16))
    parser.add_argument("--seconds", type=float, default=60, help="how long to repeat, for one model and batch size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        whole = torchvision.models.get_model(name, weights=None).eval()
        networks = {1.0: (whole, 1.0), **{target: pruned(whole, target) for target in (0.5, 0.25)}}
        for batch in args.batches:
            rows += compare(name, networks, batch, args.seconds)
            args.json.write_text(json.dumps(rows, indent=1))


def pruned(model: nn.Module, target: float) -> tuple[nn.Module, float]:
    """The network with about `target` of the MACs, and the share that it has."""
    x = torch.randn(1, 3, 224, 224)
    graph = surgery.trace(model, x)
    before = surgery.predict(graph, graph.kept_classes({})).macs

    def macs(share: float) -> float:
        plan = half_of_each_group(model, graph, share, round_to=8)
        return surgery.predict(graph, surgery.resolve(graph, plan).kept).macs / before

    share = min((step / 100 for step in range(5, 90)), key=lambda share: abs(macs(share) - target))
    plan = half_of_each_group(model, graph, share, round_to=8)
    small = surgery.edit(model, plan, graph)
    surgery.verify(model, small, plan, graph)
    return small, macs(share)


@torch.inference_mode()
def compare(name: str, networks: dict[float, tuple[nn.Module, float]], batch: int, budget: float) -> list[Any]:
    """Rows of one model and batch size."""
    x = torch.randn(batch, 3, 224, 224)
    ready = {(target, way): prepare(model, x, way) for target, (model, _) in networks.items() for way in WAYS}
    best = dict.fromkeys(ready, float("inf"))
    end = time.perf_counter() + budget
    rounds = 0
    while time.perf_counter() < end or rounds < 3:
        for key, run in ready.items():
            began = time.process_time()
            run()
            best[key] = min(best[key], time.process_time() - began) if rounds else float("inf")
        rounds += 1
    rows = []
    for target, (_, share) in networks.items():
        for way in WAYS:
            gone = 1 - best[target, way] / best[1.0, way]
            row = {"model": name, "batch": batch, "macs": round(share, 3), "way": way, "rounds": rounds}
            row |= {"ms": round(1000 * best[target, way], 2)}
            if target < 1:
                row["arrives"] = round(gone / (1 - share), 3)
            rows.append(row)
            print(*(f"{value}" for value in row.values()), sep="\t", flush=True)
    return rows


def prepare(model: nn.Module, x: Tensor, way: str) -> Callable[[], Any]:
    """One pass of the network in the given way."""
    if way == "ONNX Runtime":
        return in_onnxruntime(model, x)
    if way == "as saved":
        return lambda: model(x)
    folded = fuse(model)
    if way == "folded":
        return lambda: folded(x)
    folded, last = folded.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return lambda: folded(last)


def in_onnxruntime(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """One pass of the exported network."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx"
        pk.export(model, target, x)
        session = onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, inputs)


if __name__ == "__main__":
    main()
