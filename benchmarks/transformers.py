"""A small vision transformer: half of its heads and MLPs gone, restored from images without labels, or not at all.

    python benchmarks/transformers.py MODEL.pt --data digits --json transformers.json

MODEL.pt comes from

    prunekit train --arch vit_digits --data digits --optimizer adamw --lr 0.004 --warmup 3 --augment none --epochs 60

or, in hours, from `--arch vit_cifar --data cifar10 --optimizer adamw --warmup 5 --epochs 60`. Each row is one share of
every head and MLP gone and one way of restoring; rows that the file holds are not measured again. Accuracy is that of
all test images; calibration sees training images alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import prunekit as pk

RATIOS = (0.25, 0.5)
WAYS = ("none", "calibrate")
PARTS = ("both", "heads", "mlps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a trained vision transformer")
    parser.add_argument("--data", default="digits", help="what it was trained on")
    parser.add_argument("--data-root", help="where named data sets are")
    parser.add_argument("--json", type=Path, default=Path("transformers.json"))
    parser.add_argument("--images", type=int, default=1000, help="training images for calibration, without labels")
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS)
    parser.add_argument("--parts", choices=PARTS, nargs="*", default=PARTS)
    args = parser.parse_args()
    rows: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    model, data = pk.load(args.model), pk.open_data(args.data, "test", root=args.data_root)
    chosen = pk.open_data(args.data, "train", root=args.data_root).sample(args.images, seed=0)
    images = next(chosen.batches(len(chosen)))[0]
    asked = [(part, ratio, way) for part in args.parts for ratio in args.ratios for way in WAYS]
    for part, ratio, way in [("none", 0.0, "none"), *asked]:
        name = "whole" if part == "none" else f"{part} {ratio:g} {way}"
        if name not in rows:
            rows[name] = row_of(model, data, part, ratio, images if way == "calibrate" else None)
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"{name:24}", rows[name], flush=True)


def row_of(model: Any, data: Any, part: str, ratio: float, images: Any) -> dict[str, Any]:
    """Return accuracy, size, and the CPU seconds of pruning with its proof, with a share of one part gone."""
    small, row = model, {}
    if part != "none":
        graph = pk.inspect(model).graph
        heads = [name for name in graph.heads if graph.group(name).free]
        mlps = [group.name for group in graph.groups if ".mlp." in group.name]
        chosen = {"heads": heads, "mlps": mlps, "both": [*heads, *mlps]}[part]
        settings: dict[str, Any] = {"restore": "none"} if images is None else {"restore": "calibrate", "images": images}
        start = time.process_time()
        result = pk.prune("merge", model, ratio=dict.fromkeys(chosen, ratio), **settings)
        small, row = result.model, {"cpu_seconds": round(time.process_time() - start, 2)}
        row["difference"] = result.difference
    score = pk.evaluate(small, data)
    return {"accuracy": score.accuracy, "parameters": score.params, "macs": score.macs, **row}


if __name__ == "__main__":
    main()
