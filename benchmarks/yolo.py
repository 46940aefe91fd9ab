"""YOLO networks trained, slimmed to 60 % of their MACs and tuned, by stock Ultralytics and the command line alone.

    python benchmarks/yolo.py --work FOLDER --json yolo.json [--only yolo11n-detect ...] [--epochs 30] [--tune 10]

Needs the extra `ultralytics`. The data are drawn: 300 images of 160 px (240 to train, 60 to validate) of discs, squares
and triangles, each with a white and a black dot, with boxes, outlines and the places of the dots. Each network is
trained from random weights, slimmed by `prunekit slim` in a process of its own, tuned, validated, exported to ONNX and
read again in a fresh process that never imports prunekit. Figures are mAP50-95 of the 60 images (of the boxes; of masks
or keypoints where the task has them) and CPU seconds of one thread. What the JSON file or the folder holds already is
not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIDE, IMAGES, TRAINING = 160, 300, 240
TASKS = {"detect": "", "segment": "-seg", "pose": "-pose"}
NETWORKS = [f"{name}-{task}" for name in ("yolo11n", "yolov8n", "yolo26n") for task in TASKS]
LATER_EPOCHS = 20
SHAPES = {"disc": 24, "square": 4, "triangle": 3}  # corners of their outlines
# no mosaic: the images hold several objects already, and 240 are few
TRAINING_ARGS = {"imgsz": SIDE, "batch": 8, "workers": 0, "device": "cpu", "seed": 0, "plots": False, "mosaic": 0.0}
TRAINING_ARGS |= {"optimizer": "AdamW", "cos_lr": True, "warmup_epochs": 1.0, "val": False, "exist_ok": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("yolo-work"), help="folder for data, weights and runs")
    parser.add_argument("--json", type=Path, default=Path("yolo.json"))
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--epochs", type=int, default=50, help="of a detector from random weights; others take 20")
    parser.add_argument("--tune", type=int, default=10, help="epochs of the tuning after the surgery")
    parser.add_argument("--until", choices=("train", "slim", "tune"), default="tune", help="the last step to take")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.only:
        row = rows.setdefault(name, {})
        for step in ("train", "slim", "tune"):
            if step not in row:
                row[step] = _step(step, name, args.work.resolve(), args.epochs if step == "train" else args.tune)
                args.json.write_text(json.dumps(rows, indent=1))
                print(name, step, json.dumps(row[step]), flush=True)
            if step == args.until:
                break
    show(rows)


def _step(step: str, name: str, work: Path, epochs: int) -> dict[str, Any]:
    """Take one step and measure what it made, each in a process of its own."""
    folder, task = work / name, name.rpartition("-")[2]
    data = drawn(work / "data", task)
    folder.mkdir(exist_ok=True)
    before, after = {"train": ("", "base"), "slim": ("base", "small"), "tune": ("small", "tuned")}[step]
    old, new = folder / f"{before}.pt", folder / f"{after}.pt"
    row: dict[str, Any] = {}
    if step == "slim":
        command = [sys.executable, "-m", "prunekit", "slim", str(old), "--trust-pickle", "--target-macs", "60%"]
        out = subprocess.run(
            [*command, "--force", "-o", str(new), "--json"], check=True, capture_output=True, text=True, env=_env()
        )
        told = json.loads(out.stdout)
        row = {what: told[what] for what in ("before", "after")}
    elif not new.exists():
        source = str(old) if before else name.rpartition("-")[0] + TASKS[task] + ".yaml"
        lr0 = 2e-3 if step == "train" else 5e-4
        row = _apart(
            "train", source=source, data=str(data), epochs=epochs, lr0=lr0, project=str(folder), target=str(new)
        )
    row |= _apart("measure", source=str(new), data=str(data))
    return row


def _apart(what: str, **arguments: Any) -> dict[str, Any]:
    """Run one of the functions below in a fresh process and return its result."""
    command = [sys.executable, __file__, "--apart", what, json.dumps(arguments)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=_env())
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


def _env() -> dict[str, str]:
    return {**os.environ, "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "OMP_NUM_THREADS": "1"}


def train(
    source: str, data: str, epochs: int, lr0: float, project: str, target: str, weights: str | None = None
) -> dict[str, Any]:
    """Train by the stock trainer; keep the last weights, whose widths must be those that it began with."""
    import time

    from ultralytics import YOLO

    started = time.process_time()
    model = YOLO(source)
    before = _shapes(model.model)
    if weights is not None:
        model.load(weights)
    model.train(data=data, epochs=epochs, lr0=lr0, project=project, name=Path(target).stem, **TRAINING_ARGS)
    last = Path(project) / Path(target).stem / "weights" / "last.pt"
    after = _shapes(YOLO(str(last)).model)
    if source.endswith(".pt"):
        assert before == after, "the trainer has changed the widths"
    last.replace(target)
    return {"epochs": epochs, "train_seconds": round(time.process_time() - started, 1)}


def measure(source: str, data: str) -> dict[str, Any]:
    """Validate, export to ONNX and validate that, in a process that has never heard of prunekit."""
    from ultralytics import YOLO

    model = YOLO(source)
    params = sum(parameter.numel() for parameter in model.model.parameters())
    row = {"map": _map(model, data), "params": params, "bytes": Path(source).stat().st_size}
    exported = YOLO(source).export(format="onnx", imgsz=SIDE, simplify=False)
    row["onnx_map"] = _map(YOLO(exported, task=model.task), data)
    assert not any(name.partition(".")[0] == "prunekit" for name in sys.modules)
    return row


def _map(model: Any, data: str) -> dict[str, float]:
    found = model.val(data=data, imgsz=SIDE, batch=1, workers=0, device="cpu", plots=False, verbose=False)
    return {name: round(float(value), 4) for name, value in found.results_dict.items() if "mAP50-95" in name}


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def drawn(folder: Path, task: str) -> Path:
    """Draw the data set of one task, unless it is there; return the file that describes it."""
    described = folder / f"{task}.yaml"
    if described.exists():
        return described
    generator = random.Random(0)
    for number in range(IMAGES):
        part = "train" if number < TRAINING else "val"
        for kind in ("images", "labels"):
            (folder / task / kind / part).mkdir(parents=True, exist_ok=True)
        image, labels = _picture(generator, task)
        image.save(folder / task / "images" / part / f"{number:03}.png")
        (folder / task / "labels" / part / f"{number:03}.txt").write_text("\n".join(labels))
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(SHAPES))
    points = "kpt_shape: [2, 3]\n" if task == "pose" else ""
    described.write_text(f"path: {folder / task}\ntrain: images/train\nval: images/val\nnames:\n{names}{points}")
    return described


def _picture(generator: random.Random, task: str) -> tuple[Any, list[str]]:
    """Draw one to four shapes that do not hide each other; return the image and a line of text for each."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), _colour(generator))
    draw, labels, places = ImageDraw.Draw(image), [], list[tuple[float, float, float]]()
    for _ in range(generator.randint(1, 4)):
        radius = generator.uniform(12, 30)
        x, y = (generator.uniform(radius, SIDE - radius) for _ in range(2))
        if any(math.hypot(x - u, y - v) < radius + r for u, v, r in places):
            continue
        places.append((x, y, radius))
        number, corners = generator.choice(list(enumerate(SHAPES.values())))
        turn = generator.uniform(0, 2 * math.pi)
        outline = list(_ring(x, y, radius, corners, turn))
        draw.polygon(outline, fill=_colour(generator))
        dots = list(_ring(x, y, radius / 3, 2, turn))
        for (u, v), fill in zip(dots, ("white", "black"), strict=True):
            draw.ellipse((u - 3, v - 3, u + 3, v + 3), fill=fill)
        labels.append(_label(number, outline, dots, task))
    return image, labels


def _ring(x: float, y: float, radius: float, corners: int, turn: float) -> Iterator[tuple[float, float]]:
    for corner in range(corners):
        angle = turn + 2 * math.pi * corner / corners
        yield x + radius * math.cos(angle), y + radius * math.sin(angle)


def _colour(generator: random.Random) -> tuple[int, int, int]:
    return generator.randint(30, 225), generator.randint(30, 225), generator.randint(30, 225)


def _label(number: int, outline: list[tuple[float, float]], dots: list[tuple[float, float]], task: str) -> str:
    """Return a shape as Ultralytics reads it: class, box or outline, and keypoints, all from 0 to 1."""
    if task == "segment":
        numbers = [length / SIDE for point in outline for length in point]
    else:
        (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in zip(*outline, strict=True))
        box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        numbers = [length / SIDE for length in box]
        if task == "pose":
            numbers += [entry for u, v in dots for entry in (u / SIDE, v / SIDE, 2)]
    return " ".join([str(number), *(f"{entry:.5f}" for entry in numbers)])


def show(rows: dict[str, Any]) -> None:
    """Print what each step was worth."""
    print("\n| network | MACs left | parameters left | mAP trained | slimmed | tuned | of the ONNX file |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        if "slim" not in row:
            continue
        macs, params = (row["slim"]["after"][what] / row["slim"]["before"][what] for what in ("macs", "params"))
        maps = [_shown(row[step]["map"]) if step in row else "" for step in ("train", "slim", "tune")]
        onnx = _shown(row["tune"]["onnx_map"]) if "tune" in row else ""
        print(f"| {name} | {macs:.1%} | {params:.1%} | {' | '.join(maps)} | {onnx} |")


def _shown(maps: dict[str, float]) -> str:
    return " / ".join(f"{value:.3f}" for value in maps.values())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--apart"]:
        print(json.dumps({"train": train, "measure": measure}[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        main()
