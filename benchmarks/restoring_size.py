"""A ResNet-50 restored from hundreds of images of 224 pixels: peak memory, and CPU time beside plain forward passes.

    python benchmarks/restoring_size.py --images 500 --json benchmarks/results/restoring-size.json

Weights, statistics and images are random, for only their sizes matter here. Peak memory is that of the process above
what it was with the network loaded; the images themselves, held as float32, count. The passes are timed in the same
process, after the restoration, on `--timed` of the images, and scaled to all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from merging import _peak, _reset_peak
from torch import Tensor, nn

import prunekit as pk

BATCH = 16  # of the plain passes


def main() -> None:
    """Restore once, and write the figures."""
    options = _options()
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.network, weights=None).eval()
    _reset_peak()
    before = _peak()
    images = torch.randn(options.images, 3, options.pixels, options.pixels)
    held = _peak() - before
    started = time.process_time()
    with pk.report_progress(_Said()):
        settings = {"ratio": options.ratio, "restore": "calibrate", "memory": options.memory}
        result = pk.prune("merge", model, images[:1], images=images, **settings)
    seconds, peak = time.process_time() - started, _peak() - before
    pair = (_seconds(model, images[: options.timed]) + _seconds(result.model, images[: options.timed])) / options.timed
    row: dict[str, Any] = {
        "network": options.network,
        "pixels": options.pixels,
        "images": len(images),
        "memory": options.memory,
        "peak_mib": round(peak),
        "images_mib": round(held),
        "cpu_seconds": round(seconds, 1),
        "three_passes_of_both": round(3 * pair * len(images), 1),
        "ratio": round(seconds / (3 * pair * len(images)), 3),
        "difference": result.difference,
    }
    print(json.dumps(row), flush=True)
    if options.json:
        path = Path(options.json)
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        document = {"schema": "prunekit.bench.restoring_size", "version": 1, "rows": [*rows, row]}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _seconds(model: nn.Module, images: Tensor) -> float:
    """CPU seconds of plain forward passes on images."""
    started = time.process_time()
    with torch.inference_mode():
        for batch in images.split(BATCH):
            model(batch)
    return time.process_time() - started


class _Said:
    """Reporter of each stage, with the CPU seconds so far and the peak of memory."""

    def __init__(self) -> None:
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Print a line where a stage begins or ends."""
        if what != self._what or done == total:
            print(f"{what} {done}/{total}: {time.process_time():.0f} CPU s, peak {_peak():.0f} MB", flush=True)
        self._what = what


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="a classifier of torchvision")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--timed", type=int, default=64, help="images that the plain passes are timed on")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--json", help="append the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
