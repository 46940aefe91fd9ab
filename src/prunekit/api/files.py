"""Networks from files, and files from networks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import torch
from torch import nn

from prunekit import surgery
from prunekit.api.subject import example_input
from prunekit.devices import check_whole
from prunekit.spec import InputSpec, Origin, origin_of, remember, stated

if TYPE_CHECKING:
    from prunekit.exporting.parity import Batch
    from prunekit.exporting.writer import Exported


def load(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    key: str | None = None,
    ignore_keys: Sequence[str] = (),
    input_spec: InputSpec | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    input_size: int | Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    map_location: str | torch.device = "cpu",
    runtime: Literal["masked", "gather", "buckets", "auto"] | None = None,
    budget: str | None = None,
) -> nn.Module:
    """Load a network, in eval mode, that remembers where it came from and what it reads.

    What a file is shows in its content, not in its name. Nothing in it is executed, except with `trust_pickle`, or
    where a file of prunekit's names code as its architecture and `arch` names that code.

    Args:
        source: A path or a binary stream: a file that `save` or `export` wrote, or a checkpoint (state dict,
            safetensors, pickled module, exported program). Or a network without a file, by name: `prunekit:resnet20`,
            `torchvision:resnet18`.
        arch: The architecture of a state dict: a bundled one, `torchvision:NAME`, or `path/to/file.py:callable`.
        arch_args: Its arguments.
        trust_pickle: Unpickle whatever the file holds. Only for files whose origin you trust: pickles run code.
        key: Where a checkpoint holds several networks: the keys that lead to one, joined by dots.
        ignore_keys: Patterns of a state dict's keys to leave out, such as `loss.*`.
        input_spec: What the network reads, in place of what the file says.
        mean: Of that, the mean of each channel alone, for pixels from 0 to 1; one number stands for all channels.
        std: The standard deviation of each channel, likewise.
        input_size: The size of an image alone: a side, `(H, W)` or `(C, H, W)`.
        classes: The names of a classifier's outputs, in their order, where the file does not say. Labelled images are
            matched with them by the names of their own classes, which may be some of these, in any order.
        map_location: The device of the weights.
        runtime: For networks with gates (ManiDP): how to run them, for inference alone.
        budget: For networks with gates: the name of stored thresholds, which the network then has.

    Raises:
        InputError: The source is no such network, or has no such budget or runtime, or the input makes no sense.

    Examples:
        >>> import prunekit as pk
        >>> pk.save(pk.load("prunekit:resnet20"), "net.pt")
        >>> model = pk.load("net.pt")
        >>> sum(parameter.numel() for parameter in model.parameters())
        269722
        >>> wide = pk.load("prunekit:resnet20", mean=0.5, std=0.25, input_size=64)
        >>> pk.inspect(wide).graph.example_shapes
        ((1, 3, 64, 64),)
    """
    from prunekit.checkpoint import load as read

    model = read(
        source,
        arch=arch,
        arch_args=arch_args,
        trust_pickle=trust_pickle,
        key=key,
        ignore_keys=ignore_keys,
        input_spec=input_spec,
        classes=classes,
        map_location=map_location,
    )
    if (mean, std, input_size) != (None, None, None):
        origin = origin_of(model) or Origin("")
        spec = stated(origin.input, mean=_numbers(mean), std=_numbers(std), size=_numbers(input_size))
        remember(model, replace(origin, input=spec))
    if budget is not None:
        from prunekit.methods.manidp.budgets import use_budget

        use_budget(model, budget)
    if runtime is None:
        return model
    from prunekit.methods.manidp.runtimes.choose import accelerate

    return accelerate(model, runtime)[0]


def _numbers(value: Any) -> Any:
    """Return one number as a tuple."""
    return value if value is None or isinstance(value, Sequence) else (value,)


def export(
    model: nn.Module,
    target: str | Path,
    x: Any = None,
    *,
    images: Iterable[Batch] | None = None,
    force: bool = False,
    opset: int | None = None,
    fixed_batch: int | None = None,
    fold_bn: bool = False,
    tolerance: float = 1e-4,
    min_agreement: float = 1.0,
) -> Exported:
    """Write a network as `.pt2` or `.onnx`, which need neither prunekit nor the model's code.

    Before it is kept, the file is run as its users will run it, and every output compared with the model's.

    Args:
        model: The network; it stays as it is.
        target: The file; its suffix says the format.
        x: An example input `(N, ...)`, or a tuple of all positional inputs. By default one of the shape that the model
            remembers.
        images: Normalised batches `(n, C, H, W)`, each with its labels `(n,)` or None, to compare on. By default
            random inputs.
        force: Overwrite a file.
        opset: ONNX's operator set; by default the exporter's own.
        fixed_batch: The one batch size that the file takes; by default it takes any.
        fold_bn: Make batch norms part of the convolutions in front of them.
        tolerance: The largest difference of outputs, relative to the largest output where that is above one.
        min_agreement: The least share of images, 0 to 1, that must get the same top class.

    Returns:
        What was written, and as `parity` how it compares with the model.

    Raises:
        InputError: An unknown suffix, a target that exists, or a package that is missing.
        SurgeryError: The model cannot be exported.
        CheckFailed: The file's outputs are not the model's. Nothing is written.

    Examples:
        >>> import torch, prunekit as pk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> done = pk.export(model, "net.pt2", torch.zeros(1, 3, 8, 8))
        >>> done.parity.difference < 1e-5
        True
    """
    from prunekit.exporting.writer import ExportOptions
    from prunekit.exporting.writer import export as write

    options = ExportOptions(
        opset=opset, fixed_batch=fixed_batch, fold_bn=fold_bn, tolerance=tolerance, min_agreement=min_agreement
    )
    check_whole(model)
    model = surgery.materialised(surgery.unwrapped(model))
    return write(model, target, example_input(model, x), options=options, images=images, force=force)
