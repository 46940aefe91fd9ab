"""U-Nets of segmentation_models_pytorch, pruned by command line alone: mean IoU before, pruned, restored and tuned.

The data are drawn by this script (64 pixels, four classes: background, discs, boxes and triangles), seeded. Everything
else is commands of prunekit; seconds are of the CPU (user and system), of each command as a whole.

    python benchmarks/segmentation.py --folder /tmp/segmentation -o benchmarks/results/segmentation.json

A finished command is not run again; `--images` and `--epochs` make it shorter.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

ENCODERS = ("resnet18", "mobilenet_v2")
SIZE = 64
NETS = """
import segmentation_models_pytorch as smp

def unet(encoder="resnet18"):
    return smp.Unet(encoder, encoder_weights=None, classes=4, decoder_channels=(128, 64, 32, 16, 16))
"""


def draw(folder: Path, count: int, seed: int) -> None:
    """Draw images with one to four shapes in colours of their own on noise, and their masks."""
    generator = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.fromarray(generator.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8))
        mask = Image.new("L", (SIZE, SIZE))
        for _ in range(generator.integers(1, 5)):
            kind, radius = int(generator.integers(1, 4)), int(generator.integers(6, 16))
            x, y = (int(value) for value in generator.integers(8, SIZE - 8, 2))
            colour = tuple(int(value) for value in generator.integers(100, 256, 3))
            for canvas, fill in ((image, colour), (mask, kind)):
                _shape(ImageDraw.Draw(canvas), kind, x, y, radius, fill)
        pixels = np.asarray(image).astype(np.int16) + generator.integers(-25, 26, (SIZE, SIZE, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number:04d}.png")
        mask.save(folder / "masks" / f"{number:04d}.png")


def _shape(canvas: ImageDraw.ImageDraw, kind: int, x: int, y: int, radius: int, fill: Any) -> None:
    if kind == 1:
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif kind == 2:
        canvas.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)


def command(folder: Path, name: str, *arguments: object) -> dict[str, Any]:
    """Run a command of prunekit in `folder`, or recall what it said; return its document and seconds of the CPU."""
    stored = folder / f"{name}.json"
    if not stored.exists():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        line = [sys.executable, "-m", "prunekit", *map(str, arguments), "--json"]
        done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        facts = {"command": " ".join(["prunekit", *map(str, arguments)]), "cpu_seconds": round(seconds, 1)}
        stored.write_text(json.dumps({**facts, "document": json.loads(done.stdout)}), encoding="utf-8")
    found: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
    return found


def measured(folder: Path, encoder: str, ratio: float, epochs: int) -> dict[str, Any]:
    """Return the figures of one U-Net."""
    task = ["--arch", "nets.py:unet", "--arch-args", f"encoder={encoder}", "--task", "segmentation", "--data", "scenes"]
    model, training = f"{encoder}.pt", ["--batch-size", 16, "--device", "cpu"]
    rows: dict[str, Any] = {}

    def row(label: str, file: str, made: dict[str, Any]) -> None:
        found = command(folder, f"{encoder}-{label}-eval", "eval", file, *task, "--no-latency")["document"]
        figures = {name: found[name] for name in ("score", "scores", "params", "macs", "images")}
        rows[label] = {**figures, "command": made["command"], "cpu_seconds": made["cpu_seconds"]}
        print(encoder, label, json.dumps(rows[label]), flush=True)

    train = ["train", *task[:4], *task[4:], "--epochs", epochs, "--lr", 0.003, "--optimizer", "adamw", *training]
    row("trained", model, command(folder, f"{encoder}-train", *train, "-o", model))
    common = ["--ratio", ratio, *task]
    ways = {
        "pruned": ["merge", model, *common, "--restore", "none"],
        "merged": ["merge", model, *common, "--restore", "paper"],
        "restored": ["merge", model, *common, "--restore", "calibrate"],
        "tuned": ["merge", model, *common, "--restore", "calibrate", "--epochs", 2, *training],
    }
    for label, line in ways.items():
        file = f"{encoder}-{label}.pt"
        row(label, file, command(folder, f"{encoder}-{label}", *line, "-o", file))
    return {"ratio": ratio, "epochs": epochs, "metric": "mean IoU", "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder / "nets.py").write_text(NETS, encoding="utf-8")
    if not (asked.folder / "scenes").exists():
        for seed, (split, count) in enumerate((("train", asked.images), ("val", 60), ("test", 150))):
            draw(asked.folder / "scenes" / split, count, seed)
    found: dict[str, Any] = {"images": asked.images}
    for encoder in ENCODERS:
        found[encoder] = measured(asked.folder, encoder, asked.ratio, asked.epochs)
        if asked.output is not None:
            asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
