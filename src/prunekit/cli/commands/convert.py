"""`prunekit convert`: from any file that prunekit reads to one that it, or another program, reads more easily."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.cli.framework.build import Command
from prunekit.cli.framework.options import READING, ModelArgument, OutputOptions, ReadingOptions
from prunekit.cli.models import STREAM, check_kind, output_path, read_model, write_model
from prunekit.errors import InputError
from prunekit.report.documents import document
from prunekit.report.terminal.output import Output

if TYPE_CHECKING:
    from torch import nn

_WEIGHTS = (".safetensors", ".pth", ".th", ".bin")  # files of a state dict alone
_PROGRAMS = (".onnx", ".pt2")


def run(output: Output, model: ModelArgument, where: OutputOptions, reading: ReadingOptions) -> None:
    """Read the network and write it as the suffix of the output says."""
    usual = ".pt2" if model.lower().endswith(".pt2") else ".pt"
    target = output_path(model, where, "converted", output, kind=usual)
    kind = Path(target).suffix.lower()
    if kind in _PROGRAMS and not model.lower().endswith(kind):
        raise InputError(f"{target} would be a program, which convert does not make", hint="prunekit export does")
    weights = target != STREAM and kind in _WEIGHTS
    network, _ = read_model(model, reading)
    check_kind(network, target)
    what = f"the state dict of {_arch(network)}" if weights else "prunekit's own file"
    if where.dry_run:
        output.note(f"would write {target}, {what}")
    elif weights and output.first:
        from prunekit.checkpoint.write import save_weights

        save_weights(network, Path(target), force=where.force)
    elif not weights:
        write_model(network, target, output, force=where.force)
    if output.json:
        facts = {"output": None if where.dry_run else target, "kind": "state dict" if weights else "prunekit"}
        output.document(document("convert", {**facts, "arch": _arch(network)}))
    elif target != STREAM and not where.dry_run:
        output.note(f"wrote {what}" + (", which does not say its architecture" if weights else ""))
        output.data(target)


def _arch(network: nn.Module) -> str:
    from prunekit.spec import origin_of

    origin = origin_of(network)
    return origin.arch if origin and origin.arch else type(network).__name__


COMMAND = Command(
    run,
    (
        "prunekit convert weights.pth --arch resnet56_cifar --mean .485,.456,.406 --std .229,.224,.225 -o model.pt",
        "prunekit convert lightning.ckpt --arch net.py:Net --ignore-keys 'loss.*' -o model.pt",
        "prunekit convert model.pt -o weights.safetensors",
    ),
    {"where": "Output", "reading": READING},
)
