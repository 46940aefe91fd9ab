"""Every way of restoration on networks that people have: proven, how near to the original, and what stays and why.

    python benchmarks/restoring_families.py --json benchmarks/results/restoring-families.json

Random weights, and batch norms with random scales and shifts that hold the statistics of smooth random images, as those
of a trained network hold its data's. Three tenths of the channels go. The error is that of the outputs on other images,
relative to how these vary: 1 is a network that says the same of all images. A way that can do nothing here is refused,
with a reason and another way. GhostNet needs timm. Finished rows are read back from the JSON file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import prunekit as pk

NETWORKS = [
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_y_400mf",
    "regnet_x_400mf",
    "convnext_tiny",
    "resnet50",
    "resnext50_32x4d",
    "mnasnet1_0",
    "timm:ghostnet_100",
]
WAYS = ["none", "paper", "moments", "synthetic", "calibrate", "default"]


def main() -> None:
    """Measure every way on every network."""
    options = _options()
    path = Path(options.json)
    document: dict[str, Any] = {
        "schema": "prunekit.bench.restoring_families",
        "version": 1,
        "command": "python benchmarks/restoring_families.py --json FILE",
        "pixels": options.pixels,
        "images": options.images,
        "ratio": options.ratio,
        "rows": json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else [],
    }
    done = {(row["network"], row["way"]) for row in document["rows"]}
    for name in options.networks.split(","):
        wanted = [way for way in options.ways.split(",") if (name, way) not in done]
        if not wanted:
            continue
        images = _smooth(2 * options.images, options.pixels)
        model = _network(name, images)
        for way in wanted:
            document["rows"].append({"network": name, "way": way, **_row(model, way, options.ratio, images)})
            print(json.dumps(document["rows"][-1]), flush=True)
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _row(model: nn.Module, way: str, ratio: float, images: Tensor) -> dict[str, Any]:
    calibration, measured = images.chunk(2)
    worked = time.process_time()
    try:
        result = pk.prune(
            "merge",
            model,
            calibration[:1],
            ratio=ratio,
            restore=None if way == "default" else way,
            images=calibration if way == "calibrate" else None,
        )
    except pk.PrunekitError as error:
        return {"refused": error.message, "hint": error.hint}
    notes = result.plan.notes
    with torch.no_grad():
        was, now = model(measured), result.model(measured)
    return {
        "error": float((now - was).square().sum() / (was - was.mean(0)).square().sum()),
        "macs": result.after.macs / result.before.macs,
        "params": result.after.params / result.before.params,
        "difference": result.difference,
        "cpu_seconds": round(time.process_time() - worked, 1),
        "narrowed": len(result.plan.keeps),
        "left": _counted(notes["left"]),
        "plain": _counted(notes["plain"]),
        "not_refitted": _counted(notes.get("calibration", notes.get("synthetic", {})).get("left", {})),
        "warning": notes.get("warning"),
    }


def _counted(reasons: dict[str, str]) -> dict[str, int]:
    return dict(Counter(reasons.values()))


def _smooth(count: int, pixels: int) -> Tensor:
    """Random images that differ in colour and contrast, with a little noise, `(count, 3, pixels, pixels)`."""
    generator = torch.Generator().manual_seed(0)
    colour, contrast = torch.randn(count, 4, 1, 1, generator=generator).split([3, 1], 1)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    fine = torch.randn(count, 3, pixels, pixels, generator=generator)
    smooth = F.interpolate(coarse, (pixels, pixels), mode="bicubic")
    return colour + (0.7 * contrast).exp() * (smooth + 0.1 * fine)


def _network(name: str, images: Tensor) -> nn.Module:
    """A network with random weights whose batch norms hold the statistics of `images`."""
    torch.manual_seed(0)
    source, _, own = name.rpartition(":")
    if source == "timm":
        import timm

        model: nn.Module = timm.create_model(own, pretrained=False)
    else:
        import torchvision

        model = torchvision.models.get_model(own, weights=None)
    model.eval()
    for key, value in model.named_parameters():
        if key.endswith("layer_scale"):  # of ConvNeXt; 1e-6 before any training
            nn.init.uniform_(value, 0.2, 0.5)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = 1.0
            module.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="restoring-families.json", help="write the rows there")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="models of torchvision, or timm:NAME")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--pixels", type=int, default=64, help="height and width of the images")
    parser.add_argument(
        "--images", type=int, default=128, help="how many calibrate sees; as many others are measured on"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
