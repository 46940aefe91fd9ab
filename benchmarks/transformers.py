"""A small vision transformer: half of its heads and MLPs gone, or of the widths inside its heads, restored or not.

    python benchmarks/transformers.py MODEL.pt --data digits --json transformers.json
    python benchmarks/transformers.py MODEL.pt --clock --json transformers-clock.json

MODEL.pt comes from

    prunekit train --arch vit_digits --data digits --optimizer adamw --lr 0.004 --warmup 3 --augment none --epochs 60

or, in hours, from `--arch vit_cifar --data cifar10 --optimizer adamw --warmup 5 --epochs 60`. Each row is one share of
every head and MLP gone and one way of restoring: `none`, `calibrate` (images without labels), or inside heads
`low-rank` (no data). Rows that the file holds are not measured again. Accuracy is that of all test images; calibration
sees training images alone.

`--clock` measures what ONNX Runtime makes of the MACs that are gone: CPU time of one thread, runs of the whole and of
the pruned network taking turns, the median of their ratios. It needs onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import prunekit as pk

RATIOS = (0.25, 0.5)
PARTS = {"both": ("none", "calibrate"), "heads": ("none", "calibrate"), "mlps": ("none", "calibrate")}
PARTS |= {"qk": ("none", "low-rank"), "widths": ("none", "low-rank")}
ROUNDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a trained vision transformer")
    parser.add_argument("--data", default="digits", help="what it was trained on")
    parser.add_argument("--data-root", help="where named data sets are")
    parser.add_argument("--json", type=Path, default=Path("transformers.json"))
    parser.add_argument("--images", type=int, default=1000, help="training images for calibration, without labels")
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS)
    parser.add_argument("--parts", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--clock", action="store_true", help="measure times in ONNX Runtime instead of accuracy")
    args = parser.parse_args()
    rows: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name, measure in (clocked(args) if args.clock else scored(args)).items():
        if name not in rows:
            rows[name] = measure()
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"{name:24}", rows[name], flush=True)


def scored(args: argparse.Namespace) -> dict[str, Any]:
    """Return what measures each row of accuracies."""
    model, data = pk.load(args.model), pk.open_data(args.data, "test", root=args.data_root)
    chosen = pk.open_data(args.data, "train", root=args.data_root).sample(args.images, seed=0)
    images = next(chosen.batches(len(chosen)))[0]

    def row(part: str, ratio: float, way: str) -> dict[str, Any]:
        start = time.process_time()
        result = None if part == "none" else cut(model, part, ratio, way, images)
        seconds = time.process_time() - start
        score = pk.evaluate(model if result is None else result.model, data)
        found = {"accuracy": score.accuracy, "parameters": score.params, "macs": score.macs}
        if result is None:
            return found
        return {**found, "cpu_seconds": round(seconds, 2), "difference": result.difference}

    rows: dict[str, Any] = {"whole": lambda: row("none", 0.0, "none")}
    for part in args.parts:
        for ratio in args.ratios:
            for way in PARTS[part]:
                rows[f"{part} {ratio:g} {way}"] = lambda p=part, r=ratio, w=way: row(p, r, w)
    return rows


def cut(model: Any, part: str, ratio: float, way: str, images: Any) -> Any:
    """Return the network with a share of one part gone."""
    graph = pk.inspect(model, inside_heads=part in ("qk", "widths")).graph
    if part in ("qk", "widths"):
        kinds = ("[qk]",) if part == "qk" else ("[qk]", "[v]", "[qkv]")
        chosen = [group for group in graph.groups if group.name.endswith(kinds)]
        asked = {group.name: ratio for group in chosen}
        result = pk.prune("narrow-heads", model, ratio=asked, parts="qk" if part == "qk" else "all")
        if way == "low-rank":
            return result
        return Plainly(pk.apply(model, pk.Plan(result.plan.keeps)), result.difference)
    heads = [name for name in graph.heads if graph.group(name).free]
    mlps = [group.name for group in graph.groups if ".mlp." in group.name]
    names = {"heads": heads, "mlps": mlps, "both": [*heads, *mlps]}[part]
    settings: dict[str, Any] = {"images": images} if way == "calibrate" else {}
    return pk.prune("merge", model, ratio=dict.fromkeys(names, ratio), restore=way, **settings)


class Plainly:
    """The first coordinates kept as they are, to compare with."""

    def __init__(self, model: Any, difference: float | None) -> None:
        self.model, self.difference = model, difference


def clocked(args: argparse.Namespace) -> dict[str, Any]:
    """Return what measures each row of times, with half of a part gone: in batches of 1 and of 16."""
    model = pk.load(args.model)

    def row(part: str, batch: int) -> dict[str, Any]:
        (shape,) = pk.inspect(model).graph.example_shapes
        x = torch.randn(batch, *shape[1:])
        small = cut(model, part, 0.5, "low-rank" if part in ("qk", "widths") else "none", None).model
        before, after = (pk.inspect(one, x[:1]).cost.macs for one in (model, small))
        ratio = paired(model, small, x)
        gone = 1 - after / before
        return {"macs_cut": round(gone, 4), "time_cut": round(1 - ratio, 4), "share": round((1 - ratio) / gone, 3)}

    return {f"{part} batch {batch}": lambda p=part, b=batch: row(p, b) for part in args.parts for batch in (1, 16)}


def paired(model: Any, small: Any, x: torch.Tensor) -> float:
    """Return the median ratio of the CPU times of runs of both in ONNX Runtime, taking turns."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for name, one in (("whole", model), ("small", small)):
            path = Path(folder) / f"{name}.onnx"
            torch.onnx.export(one.eval(), (x,), path, dynamo=False, input_names=["x"])
            sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS + 3):
            for own, session in zip(times, sessions, strict=True):
                start = time.process_time()
                session.run(None, {"x": x.numpy()})
                own.append(time.process_time() - start)
    return statistics.median(b / a for a, b in zip(times[0][3:], times[1][3:], strict=True))


if __name__ == "__main__":
    main()
