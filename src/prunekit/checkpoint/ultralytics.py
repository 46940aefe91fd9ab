"""Checkpoints of Ultralytics (YOLO): read their network, and write one whose widths its own trainer keeps.

That trainer builds the network anew, from the description that the checkpoint holds (`model.yaml`), and copies the
weights that fit. The description names a class and its arguments for each layer, and the classes work out most widths
by themselves: that of a pruned layer cannot be said. But a row may name any function that Ultralytics' builder knows.
Here it is the one that reads torch files, and the argument is such a file in memory: layers with zeros for weights. A
layer that reads several others may only be one of Ultralytics' own classes there, so that there are two rows: all
layers up to the head as one network, which returns what the head reads, and the head.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunekit.errors import Noted, SurgeryError
from prunekit.files.pickles import first_line
from prunekit.spec import InputSpec, Origin, remember
from prunekit.surgery.copying import copied

TRIED = ("8.4.0", "8.4.60", "8.4.120", "8.4.190")

_READER = "torch_load"  # the function of Ultralytics' builder that reads a torch file
_NOTES = "prunekit"  # the entry of a description that only prunekit reads
_SIZED = (
    "scales",
    "scale",
    "depth_multiple",
    "width_multiple",
    "activation",
)  # what a pruned description has no use for
_SIDE = 640  # of the images, where a checkpoint does not say


def is_checkpoint(content: Any) -> bool:
    """Return whether a trusted file holds what Ultralytics' trainer saves."""
    return isinstance(content, Mapping) and is_network(content.get("ema") or content.get("model"))


def is_network(model: Any) -> bool:
    """Return whether this is a network of Ultralytics that its own description can build."""
    ours = type(model).__module__.partition(".")[0] == "ultralytics"
    return ours and isinstance(model, nn.Module) and isinstance(getattr(model, "yaml", None), dict)


def read(content: Mapping[str, Any]) -> nn.Module:
    """Return the network of a checkpoint, in single precision and with the layers that its class builds.

    As Ultralytics does, the moving average of the weights is preferred. Images are read with pixels from 0 to 1.
    """
    model: Any = (content.get("ema") or content["model"]).float()
    model.args = _arguments(content.get("train_args") or getattr(model, "args", {}))
    _unfreeze(model)
    notes = json.loads(model.yaml.pop(_NOTES, "{}"))
    if notes:
        _unpack(model, notes["description"])
    size, channels = model.args.get("imgsz", _SIDE), int(model.yaml.get("channels", 3))
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    spec = InputSpec((channels, *sides), (0.0,) * channels, (1.0,) * channels)
    names = getattr(model, "names", {})
    classes = tuple(map(str, names.values() if isinstance(names, Mapping) else names))
    return remember(model, Origin("", input=spec, classes=classes, history=tuple(notes.get("history", ()))))


def to_bytes(model: nn.Module, origin: Origin) -> bytes:
    """Return a checkpoint that Ultralytics reads, trains, validates and exports, without prunekit.

    Weights are in half precision, as in all its files, unless one is too large for that.

    Raises:
        SurgeryError: Ultralytics does not rebuild the network with its widths.
    """
    network: Any = copied(model)
    vars(network).pop("_prunekit_origin", None)
    _forget_anchors(network.model[-1])
    network.args = _arguments(getattr(network, "args", {}))
    if origin.input is not None:
        network.args["imgsz"] = max(origin.input.shape[1:])
    if origin.history or not _fits(network):
        _pack(network, origin)
        _check_rebuilt(network)
    half = copy.deepcopy(network).half()
    if all(tensor.isfinite().all() for tensor in half.state_dict().values()):
        network = half
    network.requires_grad_(False)
    content = {"epoch": -1, "model": network, "ema": None, "optimizer": None, "train_args": network.args}
    buffer = io.BytesIO()
    torch.save(content | {"version": _version()}, buffer)
    return buffer.getvalue()


def _arguments(args: Any) -> dict[str, Any]:
    """Return the settings of a training as a dictionary."""
    return dict(args if isinstance(args, Mapping) else vars(args))


def _unfreeze(model: nn.Module) -> None:
    """Let the weights be trained again: finished checkpoints hold all of them frozen."""
    model.requires_grad_(True)
    for module in model.modules():
        if type(module).__name__ == "DFL":  # a constant, which its forward reads as a convolution
            module.requires_grad_(False)


def _forget_anchors(head: Any) -> None:
    """Drop what the head has kept of the image that it saw last; it is made anew."""
    for name in ("shape", "anchors", "strides"):
        vars(head).pop(name, None)


def _pack(network: Any, origin: Origin) -> None:
    """Put the layers into the two that a description can give, and describe them."""
    from ultralytics.nn import tasks

    *layers, head = network.model
    gather = nn.Identity()
    gather.i, gather.f, gather.type = head.i, head.f, "prunekit.gather"  # type: ignore[assignment]
    body = tasks.BaseModel()
    body.model, body.save = nn.Sequential(*layers, gather), list(network.save)
    for number, part in enumerate((body, head)):
        part.i, part.f, part.type = number, -1, _READER
    network.model, network.save = nn.Sequential(body, head), []
    description = {key: value for key, value in network.yaml.items() if key not in _SIZED}
    notes = {"description": network.yaml, "history": [dict(step) for step in origin.history]}
    rows = [[-1, 1, _READER, [_template(part)]] for part in (body, head)]
    network.yaml = description | {"backbone": rows[:1], "head": rows[1:], _NOTES: json.dumps(notes, sort_keys=True)}


def _unpack(network: Any, description: dict[str, Any]) -> None:
    """Undo `_pack`: the layers as their class has them, under the names that they had."""
    body, head = network.model
    *layers, gather = body.model
    head.i, head.f, head.type = gather.i, gather.f, type(head).__name__
    network.model, network.save = nn.Sequential(*layers, head), body.save
    network.yaml = description | {key: network.yaml[key] for key in ("nc", "channels") if key in network.yaml}


def _template(layer: nn.Module) -> io.BytesIO:
    """Return a torch file of `layer` with zeros for weights, compressed; they will be loaded into it."""
    blank = copy.deepcopy(layer)
    for tensor in blank.state_dict(keep_vars=True).values():
        tensor.data = torch.zeros_like(tensor)
    _unfreeze(blank)
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(blank, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w") as target:
        for member in source.infolist():
            entry = zipfile.ZipInfo(member.filename)  # without a date: one network, one file
            target.writestr(entry, source.read(member), zipfile.ZIP_DEFLATED)
    packed.seek(0)
    return packed


def _fits(network: Any) -> bool:
    """Return whether the present description builds a network with these widths."""
    return _shapes(_rebuilt(network)) == _shapes(network)


def _rebuilt(network: Any) -> Any:
    """Build the network as Ultralytics' trainer does."""
    yaml = copy.deepcopy(network.yaml)
    return type(network)(yaml, ch=yaml.get("channels", 3), nc=yaml["nc"], verbose=False)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _check_rebuilt(network: Any) -> None:
    """Build the network as the trainer does, and compare the result; warn of versions that were never tried.

    Raises:
        SurgeryError: Building fails, or gives other widths or another output.
    """
    version, tried = _version(), f"tried were {', '.join(TRIED)}"
    strangers = {type(m).__module__.partition(".")[0] for m in network.modules()} - {
        "torch",
        "torchvision",
        "ultralytics",
    }
    if strangers:
        raise SurgeryError(f"Ultralytics could not read the pruned network without {', '.join(sorted(strangers))}")
    try:
        again = _rebuilt(network)
        kept = _shapes(again) == _shapes(network)
        again.load(network)
    except Exception as error:  # a version that builds otherwise may fail anywhere
        message = f"Ultralytics {version} does not build a pruned network from its description: {first_line(error)}"
        raise SurgeryError(message, hint=tried) from error
    if not kept:
        raise SurgeryError(f"Ultralytics {version} would not keep the widths of a pruned network", hint=tried)
    if version not in TRIED:
        text = f"Ultralytics {version} was never tried with pruned networks ({tried}); it rebuilds this one"
        warnings.warn(text, Noted, stacklevel=2)


def _version() -> str:
    import ultralytics

    return str(ultralytics.__version__)
