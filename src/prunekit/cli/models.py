"""Model arguments: from a file, a pipe or a name to a network, and back to a file or a pipe."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from prunekit.cli import named_code
from prunekit.cli.framework.options import DataOptions, OutputOptions, ReadingOptions, choose_device, input_spec
from prunekit.errors import InputError, Noted, unknown_name

if TYPE_CHECKING:
    from torch import nn

    from prunekit.cli.framework.options import Split
    from prunekit.data import Examples
    from prunekit.report.terminal.output import Output
    from prunekit.spec import InputSpec

STREAM = "-"
_NAMED = ("prunekit:", "torchvision:", "timm:")
# suffix of another format -> the command that writes it
_OTHERS = {".onnx": "export", ".safetensors": "convert"}
_MOST_DIMS = 5  # of a batch whose shape a network can remember
_PROGRAM = ".pt2"  # the suffix of exported programs
_SUFFIXES = (".pt", ".pth", ".pt2", ".th", ".bin", ".ckpt", ".safetensors", ".tar")


def read_model(source: str, reading: ReadingOptions, device: str | None = "cpu") -> tuple[nn.Module, int | None]:
    """Return the network that `source` names, on `device`, and the size of its file in bytes (None without a file).

    The values of `--input-size`, `--mean`, `--std` and `--classes` become part of the network's origin. Code in a file
    that `--arch` names is remembered for this source, and found again where `--arch` is left out.
    """
    check_source(source)
    reading = _recalled(source, reading)
    classes, place = reading.class_names(), choose_device(device)
    from prunekit import checkpoint
    from prunekit.checkpoint.read import as_stored
    from prunekit.spec import Origin, origin_of, remember

    content = _stdin() if source == STREAM else None
    load = checkpoint.load if reading.input_size is None else as_stored
    model = load(
        io.BytesIO(content) if content is not None else source,
        arch=reading.arch,
        arch_args=reading.arguments(),
        trust_pickle=reading.trust_pickle,
        key=reading.key,
        ignore_keys=[pattern.strip() for pattern in (reading.ignore_keys or "").split(",") if pattern.strip()],
    )
    if reading.arch is not None:
        named_code.remember(source, reading.arch, reading.arch_args)
    origin = origin_of(model) or Origin("")
    named = origin.classes if classes is None else classes
    remember(model, dataclasses.replace(origin, input=input_spec(reading, origin.input), classes=named))
    return model.to(place), len(content) if content is not None else _file_size(source)


def _recalled(source: str, reading: ReadingOptions) -> ReadingOptions:
    """Return the options with the code that was named for this file before, where they name none."""
    entry = named_code.recall(source) if reading.arch is None and source != STREAM else None
    if entry is None:
        return reading
    warnings.warn(f"took --arch {entry.arch}, which was named for {source} before", Noted, stacklevel=3)
    return dataclasses.replace(reading, arch=entry.arch, arch_args=reading.arch_args or entry.arch_args)


def check_inputs(
    source: str | None, data: DataOptions, reading: ReadingOptions, *, images_needed: bool = False
) -> None:
    """Raise `InputError` for paths that lead nowhere and options that cannot be read, before torch is imported."""
    data.check(needed=images_needed)
    reading.check()
    if source is not None:
        check_source(source)


def check_source(source: str) -> None:
    """Raise `InputError` where `source` names neither a file nor a network, before torch is imported to read it."""
    if source == STREAM or os.path.lexists(source):
        return
    if not source.startswith(_NAMED):
        raise InputError(
            f"there is no file {source}",
            hint="a network without a file is prunekit:NAME, torchvision:NAME or timm:NAME",
        )
    prefix, _, name = source.partition(":")
    if prefix == "prunekit":  # which networks torchvision has depends on its version
        from prunekit.models import known

        if not {name, f"{name}_cifar"} & {*known.bundled()}:
            raise unknown_name("architecture", name, known.bundled())


def without_budget(source: str) -> tuple[str, str | None]:
    """Split `half.pt@50%` into the file and the budget of its gates; None for a source that names no budget."""
    file, _, budget = source.rpartition("@")
    if not file or not budget or source.startswith(_NAMED) or os.path.lexists(source):
        return source, None
    return file, budget


def read_teacher(source: str | None, reading: ReadingOptions) -> nn.Module | None:
    """Return the network that `--distill` names, read by its own description, or else by `--arch`; None without one."""
    if source is None:
        return None
    try:
        return read_model(source, ReadingOptions())[0]
    except InputError:
        # a state dict, or code that runs only where it is named
        if reading.arch is None:
            raise
        return read_model(source, ReadingOptions(arch=reading.arch))[0]


def spec_of(model: nn.Module) -> InputSpec:
    """Return the input that the network reads; raise `InputError` where it is unknown."""
    from prunekit.spec import origin_of

    origin = origin_of(model)
    if origin is None or origin.input is None:
        raise InputError("the model does not say how large its input is", hint="add --input-size, such as 3x224x224")
    return origin.input


def open_for(
    output: Output, model: nn.Module, data: DataOptions, split: Split, reading: ReadingOptions, *, lazy: bool = False
) -> Examples:
    """Return the examples of a split, prepared for a network; it remembers what it reads, where they tell that first.

    Raises:
        InputError: The data cannot be read, or does not fit; or nothing says what the network reads.
    """
    from prunekit.spec import InputSpec, Origin, origin_of, remember
    from prunekit.tasks.sets import fitted_to, inputs_of

    if not data.of_task:
        return fitted_to(model, data.open(output, split, spec_of(model), reading, lazy=lazy))
    origin = origin_of(model) or Origin("")
    examples = data.open(output, split, origin.input, reading)
    inputs = inputs_of(examples)
    if origin.input is None and len(inputs) == 1 and inputs[0].is_floating_point() and inputs[0].dim() <= _MOST_DIMS:
        remember(model, dataclasses.replace(origin, input=InputSpec(tuple(inputs[0].shape[1:]))))
    return examples


def output_path(source: str, options: OutputOptions, suffix: str, output: Output, *, kind: str | None = None) -> str:
    """Return the artefact's path, checked before any work: `--output`, or `NAME-suffix` and `kind` beside the source.

    By default a `.pt2` stays a `.pt2`, and everything else becomes a `.pt`.
    """
    if options.out == STREAM:
        if output.json and not options.dry_run:
            raise InputError("--json and -o - both want standard output", hint="write the model to a file")
        if sys.stdout.isatty() and not options.dry_run:
            raise InputError("-o - would write a binary file to the terminal", hint="send it to a file or a pipe")
        return STREAM
    if options.out is None and source == STREAM:
        raise InputError("a model from standard input has no name", hint="say where it goes with -o FILE or -o -")
    if kind is None:
        _check_format(options.out)
        kind = _PROGRAM if source.lower().endswith(_PROGRAM) else ".pt"
    path = Path(options.out) if options.out is not None else beside(source, suffix, kind)
    if path.exists() and options.if_exists == "skip" and not options.dry_run:
        _skip(path, output)
    if path.exists() and not (options.force or options.dry_run):
        raise InputError(f"{path} exists", hint="replace it with --force, or choose another name with -o")
    return str(path)


def _check_format(target: str | None) -> None:
    """Refuse the suffix of another format for prunekit's own file."""
    suffix = Path(target or "").suffix.lower()
    if suffix in _OTHERS:
        hint = f"write a .pt and make the {suffix} of it: prunekit {_OTHERS[suffix]} MODEL.pt -o {target}"
        raise InputError(f"cannot write {target}: a {suffix} is another format", hint=hint)


def _skip(path: Path, output: Output) -> NoReturn:
    """End the command with status 0, the file that is there already as its result."""
    if output.json:
        raise InputError("--json has nothing to report with --if-exists skip", hint="leave one of them out")
    output.note(f"{path} exists: nothing to do")
    output.data(str(path))
    raise typer.Exit


def check_kind(model: nn.Module, target: str) -> None:
    """Raise `InputError`, before any work, where the suffix of an artefact contradicts its kind."""
    from prunekit.checkpoint.ultralytics import is_network
    from prunekit.programs.program import ExportedProgram
    from prunekit.spec import origin_of

    origin = origin_of(model)
    if is_network(model) and not (origin and origin.arch) and target != STREAM and Path(target).suffix != ".pt":
        raise InputError(f"cannot write {target}: Ultralytics reads .pt files alone", hint="call it NAME.pt")
    named, is_program = Path(target).suffix.lower() == _PROGRAM, isinstance(model, ExportedProgram)
    if target == STREAM or named == is_program:
        return
    if is_program:
        raise InputError(f"cannot write {target}: an exported program stays one", hint=f"call it NAME{_PROGRAM}")
    raise InputError(
        f"cannot write {target}: a {_PROGRAM} is an exported program", hint="prunekit export makes one of the result"
    )


def write_model(model: nn.Module, target: str, output: Output, *, force: bool) -> str:
    """Write the artefact to `target` (`-`: standard output); return `target`."""
    from prunekit import checkpoint
    from prunekit.spec import origin_of

    if target == STREAM:
        stream = io.BytesIO()
        checkpoint.save(model, stream)
        output.binary(stream.getvalue())
    elif output.first:
        checkpoint.save(model, Path(target), force=force)
        origin = origin_of(model)
        if origin is not None and origin.arch:  # code that was named for the network that this was made of
            named_code.remember(target, origin.arch, None)
    return target


def check_report(path: str | None, *, force: bool) -> None:
    """Raise `InputError`, before any work, where a report cannot go to `path`."""
    from prunekit.files.writing import check_target

    if path is not None:
        check_target(Path(path), force)


def write_report(path: str, text: str, *, force: bool) -> None:
    """Write a report as a file, whole or not at all."""
    from prunekit.files.writing import atomic_write

    atomic_write(path, lambda stream: stream.write(text.encode()), force=force)


def _stdin() -> bytes:
    if sys.stdin.isatty():
        raise InputError("- reads a model from standard input, which is a terminal", hint="pipe a model into it")
    content = sys.stdin.buffer.read()
    if not content:
        raise InputError("standard input is empty: expected a model", hint="did the command before it fail?")
    return content


def _file_size(source: str) -> int | None:
    path = Path(source)
    return path.stat().st_size if path.is_file() else None


def beside(source: str, suffix: str, kind: str = ".pt") -> Path:
    """Return the default output: `folder/model-suffix.pt` for `folder/model.pth.tar`, `resnet50-suffix.pt` by name."""
    path = Path(source)
    if not path.exists() and ":" in source:
        path = Path(source.partition(":")[2].partition("@")[0])
    if not path.name:
        raise InputError(
            f"'{source}' is not the name of a model", hint="a file, prunekit:NAME, torchvision:NAME or timm:NAME"
        )
    stem = path
    while stem.suffix in _SUFFIXES:
        stem = stem.with_suffix("")
    return stem.with_name(stem.name + (f"-{suffix}" if suffix else "") + kind)


def describe_source(source: str) -> str:
    """Return the model's name in results: its argument, `stdin` for `-`."""
    return "stdin" if source == STREAM else source
