"""Re-export: a modified exported program, written as an exported program again."""

from __future__ import annotations

import io

import torch

from prunekit.errors import InputError
from prunekit.exporting import formats
from prunekit.exporting.parity import compare, require
from prunekit.nn.gated import gated_layers
from prunekit.programs import archive
from prunekit.programs.program import ExportedProgram
from prunekit.spec import Origin
from prunekit.surgery.execution.sources import random_inputs


def to_bytes(program: ExportedProgram, origin: Origin) -> bytes:
    """Return the `.pt2` of `program` with notes of its origin; it takes the same batch sizes as before.

    It is read again and compared.

    Raises:
        InputError: The program has several inputs, gates, or an input of unknown size.
        SurgeryError: torch cannot export it.
        CheckFailed: The file computes something else.
    """
    if len(program.inputs) != 1:
        raise InputError(f"the program takes {len(program.inputs)} inputs, and those of one are written")
    if any(gated_layers(program)):
        raise InputError("an exported program does not keep gates apart", hint="put them into the checkpoint's network")
    example = program.example(origin)
    free = {
        place: torch.export.Dim(formats.BATCH, min=1) if place == 0 else torch.export.Dim.AUTO
        for place, size in enumerate(program.sizes)
        if size is None
    }
    shapes = {"inputs": (free,)} if free else None
    content = formats.to_pt2(program, (example,), shapes, formats.about(origin, history=True))
    again, _ = archive.read(io.BytesIO(content), "the new file")
    inputs = [(random_inputs((example,), example.device, seed)[0], None) for seed in range(2)]
    require(compare(program, again, inputs))
    return content
