"""Beyond torchvision: one model of each convolutional family of timm, and the YOLOv8n detector, pruned and proven.

    python benchmarks/families.py --json families.json

Needs timm and ultralytics, which nothing else here does. Random weights; half of the channels of each group go by L2
norm (30 % for the detector). Each model runs in a process of its own with a time limit. A model that cannot be pruned
is refused with a reason; anything else that goes wrong is a bug.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from surgery import Stopwatch, half_of_each_group, measured_in_a_process, prunable, without_drawing

FAMILIES = [
    "resnet18",
    "resnetv2_50",
    "resnext50_32x4d",
    "res2net50_26w_4s",
    "res2next50",
    "resnest14d",
    "seresnext26d_32x4d",
    "skresnet18",
    "ecaresnet26t",
    "gcresnet33ts",
    "resnetrs50",
    "densenet121",
    "dla34",
    "dpn68",
    "efficientnet_b0",
    "efficientnet_lite0",
    "efficientnetv2_rw_t",
    "mixnet_s",
    "mobilenetv2_100",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mobilenetv5_base",
    "mobilenet_edgetpu_v2_xs",
    "mnasnet_small",
    "semnasnet_075",
    "spnasnet_100",
    "fbnetc_100",
    "fbnetv3_b",
    "hardcorenas_a",
    "tinynet_e",
    "lcnet_050",
    "rexnet_100",
    "ghostnet_050",
    "ghostnetv2_100",
    "ghostnetv3_100",
    "repghostnet_050",
    "hrnet_w18_small",
    "inception_v3",
    "inception_v4",
    "inception_resnet_v2",
    "inception_next_atto",
    "legacy_xception",
    "xception41",
    "nfnet_l0",
    "regnetx_002",
    "regnety_002",
    "regnetz_b16",
    "repvgg_a0",
    "mobileone_s0",
    "repvit_m0_9",
    "selecsls42b",
    "vgg11_bn",
    "ese_vovnet19b_slim",
    "cspresnet50",
    "cspdarknet53",
    "cs3darknet_s",
    "darknet53",
    "gernet_s",
    "hgnet_tiny",
    "hgnetv2_b0",
    "tresnet_m",
    "convnext_atto",
    "convnextv2_atto",
    "convmixer_768_32",
    "poolformer_s12",
    "convformer_s18",
    "focalnet_tiny_srf",
    "starnet_s1",
    "fastvit_t8",
    "rdnet_tiny",
    "mambaout_femto",
    "edgenext_xx_small",
    "efficientvit_b0",
    "mobilevit_xxs",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("families.json"))
    parser.add_argument("--models", nargs="*", default=[*FAMILIES, "yolov8n"])
    parser.add_argument("--size", type=int, default=128, help="height and width of the input")
    parser.add_argument("--limit", type=int, default=120, help="CPU seconds for one model")
    args = parser.parse_args()
    from prunekit import prune  # noqa: F401, so that no process has to import it

    rows: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.models:
        if name not in rows:
            measure = detector if name == "yolov8n" else classifier
            rows[name] = measured_in_a_process(lambda: measure(name, args.size), args.limit)  # noqa: B023
            args.json.write_text(json.dumps(rows, indent=1))
            print(f"{name:26}", *(f"{k}={v}" for k, v in rows[name].items()), flush=True)
    good = [name for name, row in rows.items() if "difference" in row]
    print(f"\n{len(good)} of {len(rows)} pruned and proven")


def classifier(name: str, size: int) -> dict[str, Any]:
    """One model of timm, half of its channels gone."""
    import timm
    import torch

    with without_drawing() as fill:
        model = timm.create_model(name, pretrained=False, num_classes=10).eval()
        fill(model)
    wanted = model.default_cfg
    side = wanted["input_size"][1] if wanted.get("fixed_input_size") else size
    row, small = prune(model, torch.randn(1, 3, side, side), 0.5)
    shape = list(small(torch.randn(2, 3, side, side)).shape)
    return row if shape == [2, 10] else {"error": f"an output of shape {shape}"}


def detector(_name: str, _size: int) -> dict[str, Any]:
    """YOLOv8n from its configuration file, slimmed by 30 %."""
    import torch
    from ultralytics.nn.tasks import DetectionModel

    import prunekit as pk

    model = DetectionModel("yolov8n.yaml", verbose=False).eval()
    x = torch.randn(1, 3, 256, 256)
    watch = Stopwatch()
    with watch:
        pruned = pk.prune("slim", model, x, ratio=0.3)
    small = pruned.model
    row = {"params": pruned.after.params / pruned.before.params, "macs": pruned.after.macs / pruned.before.macs}
    row |= {"difference": pruned.difference, "seconds": pruned.seconds, "verify_seconds": pruned.verify_seconds}
    with torch.no_grad():
        for mode in (False, True):
            want, have = _shapes(model.train(mode)(x)), _shapes(small.train(mode)(x))
            if want != have:
                return {"error": f"outputs {have} instead of {want}"}
    return row


def _shapes(output: Any) -> list[list[int]]:
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return [list(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def prune(model: Any, x: Any, share: float) -> tuple[dict[str, Any], Any]:
    """A row of figures and the pruned model."""
    from prunekit import surgery

    watch = Stopwatch()
    with watch:
        graph = surgery.trace(model, x)
        plan = half_of_each_group(model, graph, share)
        small = surgery.edit(model, plan, graph)
    if not plan.keeps:
        reasons = sorted({reason for group in graph.groups for reason in group.frozen.values()})
        return {"refused": reasons[:3]}, small
    params = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    difference = surgery.verify(model, small, plan, graph)
    figures = {"ops": len(graph.nodes), "prunable": prunable(graph), "params": round(params, 3)}
    return figures | {"difference": difference, "seconds": watch.wall, "cpu_seconds": watch.cpu}, small


if __name__ == "__main__":
    sys.exit(main())
