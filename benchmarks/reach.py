"""How far the default of `merge` reaches: pruned and proven beside everything that plain pruning can take.

    python benchmarks/reach.py --json reach.json [--only yolo transformers timm] [--again NAME ...]

The YOLO networks of ultralytics (smallest size), image models of transformers (tiny configurations) and one model of
each family of timm, with random weights and batch norms that know their inputs. Each loses 30 % by the default and by
`--restore none --scope all`, in a process of its own with a time limit. Rows that the JSON file holds already are not
run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from families import FAMILIES
from surgery import measured_in_a_process, without_drawing

WAYS: dict[str, dict[str, str]] = {"plain": {"restore": "none", "scope": "all"}, "default": {}}
RATIO = 0.3

_TASKS = ("", "-seg", "-pose", "-obb", "-cls")
DETECTORS = (
    *("yolov3-tiny", "yolov5n", "yolov6n"),
    *(f"yolov8n{task}" for task in _TASKS),
    *("yolov9t", "yolov10n"),
    *(f"{name}{task}" for name in ("yolo11n", "yolo12n", "yolo26n") for task in _TASKS),
)

_TOKENS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 2, 1, 1]}
_STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
# The first letters of the classes of transformers, the side of the input, and a tiny configuration.
TRANSFORMERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": ("ViT", 32, {**_TOKENS, "image_size": 32, "patch_size": 8}),
    "deit": ("DeiT", 32, {**_TOKENS, "image_size": 32, "patch_size": 8}),
    "beit": ("Beit", 32, {**_TOKENS, "image_size": 32, "patch_size": 8}),
    "dinov2": ("Dinov2", 32, {**_TOKENS, "image_size": 32, "patch_size": 8, "mlp_ratio": 2}),
    "swin": ("Swin", 32, {**_SWIN, "image_size": 32, "patch_size": 4}),
    "swinv2": ("Swinv2", 32, {**_SWIN, "image_size": 32, "patch_size": 4}),
    "convnext": ("ConvNext", 64, _STAGES),
    "convnextv2": ("ConvNextV2", 64, _STAGES),
    "resnet": ("ResNet", 64, {**_RESNET, "layer_type": "basic"}),
    "regnet": ("RegNet", 64, {**_RESNET, "groups_width": 8}),
    "mobilenetv1": ("MobileNetV1", 64, {"depth_multiplier": 0.25}),
    "mobilenetv2": ("MobileNetV2", 64, {"depth_multiplier": 0.35}),
    "mobilevit": (
        *("MobileViT", 64),
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
    ),
    "segformer": ("Segformer", 64, {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}),
    "poolformer": ("PoolFormer", 64, {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}),
    "levit": (
        *("Levit", 64),
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]},
    ),
    "pvt": ("Pvt", 64, {"image_size": 64, "hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]}),
    "efficientnet": ("EfficientNet", 64, {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}),
    "cvt": ("Cvt", 64, {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}),
    "bit": ("Bit", 64, {**_RESNET, "num_groups": 4}),
    "yolos": ("Yolos", 64, {**_TOKENS, "image_size": [64, 64], "patch_size": 16, "num_detection_tokens": 5}),
    "detr": (
        *("Detr", 64),
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
        | {
            f"{side}_{what}": n
            for side in ("encoder", "decoder")
            for what, n in (("ffn_dim", 64), ("attention_heads", 4))
        },
    ),
}
ORIGINS = {"yolo": DETECTORS, "transformers": tuple(TRANSFORMERS), "timm": tuple(FAMILIES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("reach.json"))
    parser.add_argument("--only", nargs="*", choices=tuple(ORIGINS), default=tuple(ORIGINS))
    parser.add_argument("--models", nargs="*", help="some of them, by name (default: all)")
    parser.add_argument("--again", action="store_true", help="measure what the JSON file holds already, too")
    parser.add_argument("--limit", type=int, default=300, help="CPU seconds for one network")
    args = parser.parse_args()
    from prunekit import prune  # noqa: F401, so that no process has to import it

    rows: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    for origin in args.only:
        for name in ORIGINS[origin]:
            key = f"{origin} {name}"
            if (args.models and name not in args.models) or (key in rows and not args.again):
                continue
            rows[key] = measured_in_a_process(lambda: measure(origin, name), args.limit)  # noqa: B023
            args.json.write_text(json.dumps(rows, indent=1))
            print(key, json.dumps({k: _brief(v) for k, v in rows[key].items()}), flush=True)
    show(rows)


def _brief(told: Any) -> Any:
    keys = ("params", "macs", "restore", "refused", "failed", "hint", "warning", "seconds")
    return {k: told[k] for k in keys if k in told} if isinstance(told, Mapping) else told


def measure(origin: str, name: str) -> dict[str, Any]:
    """Return what each way has made of a network."""
    import torch

    torch.manual_seed(0)
    model, x = _BUILD[origin](name)
    return {way: _pruned(model, x, settings) for way, settings in WAYS.items()}


def _pruned(model: Any, x: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shares of parameters and MACs that went, or why none did, and CPU seconds."""
    import prunekit as pk

    started = time.process_time()
    row: dict[str, Any] = {}
    try:
        done = pk.prune("merge", model, x, ratio=RATIO, **settings)
    except pk.InputError as error:
        row = {"refused": error.message, "hint": error.hint}
    except pk.PrunekitError as error:
        row = {"failed": error.message, "hint": error.hint}
    else:
        notes = done.plan.notes
        row = {
            what: round(1 - getattr(done.after, what) / getattr(done.before, what), 4) for what in ("params", "macs")
        }
        row |= {"difference": done.difference, "restore": notes["restore"], "narrowed": len(done.plan.keeps)}
        row |= {"plain": _counted(notes["plain"]), "left": _counted(notes["left"]), "warning": notes.get("warning")}
    return row | {"seconds": round(time.process_time() - started, 2)}


def _counted(reasons: Mapping[str, str]) -> dict[str, int]:
    """Return how many groups have each reason, names of modules left out."""
    found: dict[str, int] = {}
    for reason in reasons.values():
        words = " ".join("..." if "." in word.strip("'\".,") else word for word in reason.split())
        found[words] = found.get(words, 0) + 1
    return found


def _yolo(name: str) -> tuple[Any, Any]:
    import ultralytics

    model = ultralytics.YOLO(f"{name}.yaml", verbose=False).model
    return with_statistics(model, _noise(1, 128))


def _transformers(name: str) -> tuple[Any, Any]:
    import transformers

    letters, side, settings = TRANSFORMERS[name]
    make = getattr(transformers, f"{letters}Config")
    task = "ForObjectDetection" if name in ("yolos", "detr") else "ForImageClassification"
    if name == "detr":
        backbone = transformers.ResNetConfig(**_RESNET, layer_type="basic", out_features=["stage4"])
        settings = settings | {"backbone_config": backbone, "use_timm_backbone": False, "backbone": None}
    model = getattr(transformers, letters + task)(make(**settings))
    return with_statistics(model, _noise(1, side))


def _timm(name: str) -> tuple[Any, Any]:
    import timm

    with without_drawing() as fill:
        model = timm.create_model(name, pretrained=False, num_classes=10)
        fill(model)
    wanted = model.default_cfg
    return with_statistics(model, _noise(1, wanted["input_size"][1] if wanted.get("fixed_input_size") else 128))


_BUILD: dict[str, Callable[[str], tuple[Any, Any]]] = {"yolo": _yolo, "transformers": _transformers, "timm": _timm}


def _noise(batch: int, side: int) -> Any:
    import torch

    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def with_statistics(model: Any, x: Any) -> tuple[Any, Any]:
    """Return the model in eval mode and its example input; its batch norms hold statistics of noise, and scales that
    differ from channel to channel.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    generator = torch.Generator().manual_seed(0)
    model = model.eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 0.3, generator=generator)
            norm.momentum = 1.0
            norm.train()
        model(_noise(4, x.shape[-1]))
    return model.eval(), x


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print how many each way prunes, and what the default takes less."""
    print("\n| networks | plain | default | plain only | MACs taken, plain | default |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for origin in ORIGINS:
        own = {key.split(" ")[1]: row for key, row in rows.items() if key.startswith(f"{origin} ")}
        done = {way: [name for name, row in own.items() if "params" in row.get(way, {})] for way in WAYS}
        both = [own[name] for name in done["plain"] if name in done["default"]]
        share = [sum(row[way]["macs"] for row in both) / max(1, len(both)) for way in WAYS]
        only = ", ".join(name for name in done["plain"] if name not in done["default"])
        counts = " | ".join(f"{len(names)} of {len(own)}" for names in done.values())
        print(f"| {origin} | {counts} | {only} | {share[0]:.1%} | {share[1]:.1%} |")


if __name__ == "__main__":
    sys.exit(main())
