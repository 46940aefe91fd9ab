"""Option groups that several commands share, and their interpretation."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunekit.errors import InputError, counted, unknown_name
from prunekit.spec import InputSpec, stated

if TYPE_CHECKING:
    import torch

    from prunekit.data import Examples, ImageSet
    from prunekit.report.terminal.output import Output
    from prunekit.tasks.base import Task

READING = "How the model is read"
DATA = "Data"

Split = Literal["train", "val", "test"]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model file, - for standard input, torchvision:NAME[@WEIGHTS], timm:NAME or prunekit:NAME.",
        show_default=False,
    ),
]


def _tasks() -> list[str]:
    from prunekit.tasks import registry

    return registry.names()


def _architectures() -> list[str]:
    from prunekit.models import known

    return known.names()


def option(default: Any = None, **metadata: Any) -> Any:
    """Return a dataclass field with the metadata that `prunekit.cli.framework.fields` reads."""
    return field(default=default, metadata=metadata)


def device_option() -> Any:
    """Return the field of `--device`."""
    return option(metavar="DEVICE", help="cpu, cuda, mps, xpu, ...; by default a GPU where there is one.")


@dataclass(frozen=True)
class ReadingOptions:
    """Options for reading a file that does not describe itself, and for preparing images."""

    arch: str | None = option(
        metavar="NAME",
        help="Architecture of a bare state dict: a bundled or torchvision name (prunekit archs lists them), "
        "timm:NAME, path/to/file.py:callable or package.module:callable. By default the one known network that its "
        "keys fit.",
        complete=_architectures,
    )
    arch_args: str | None = option(metavar="KEY=VALUE,...", help="Arguments of the architecture.")
    trust_pickle: bool = option(
        False, help="Load a pickled module although that runs code from the file. Only for files you trust."
    )
    ignore_keys: str | None = option(
        metavar="PATTERN,...", help="Keys of a state dict to leave out, such as 'loss.*' or '*.total_ops'."
    )
    key: str | None = option(
        metavar="KEY", help="Network to read from a checkpoint with several, such as params_ema or state.model."
    )
    input_size: str | None = option(metavar="SIZE", help="Input size: 224, 32x32 or 3x32x32.")
    mean: str | None = option(metavar="M,...", help="Mean of each channel, for pixels from 0 to 1.")
    std: str | None = option(metavar="S,...", help="Standard deviation of each channel.")
    classes: str | None = option(
        metavar="FILE",
        help="The classes that the outputs stand for, in their order: one name a line, or a JSON list. Images are "
        "matched with them by the names of their folders.",
    )

    def arguments(self) -> dict[str, Any] | None:
        """Return the parsed `--arch-args`; None where there are none."""
        from prunekit.models import parse_args

        return parse_args(self.arch_args) if self.arch_args else None

    def check(self) -> None:
        """Raise `InputError` for values that cannot be read, before torch is imported."""
        if self.input_size is not None:
            parse_size(self.input_size)
        self.class_names()

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names in the file of `--classes`; None where there is none. It needs no torch."""
        from prunekit.files.class_names import read_class_names

        return read_class_names(self.classes) if self.classes is not None else None


@dataclass(frozen=True)
class DataOptions:
    """Choice of the task, and of its data."""

    data: str | None = option(
        metavar="WHERE",
        help="The images: digits (bundled), a folder with one sub-folder a class, or a torchvision data set; with "
        "--task segmentation a folder with train/ and val/ or test/, each with images/ and masks/.",
    )
    data_root: str | None = option(metavar="FOLDER", help="Folder of the torchvision data set.")
    skip_bad: bool = option(False, help="Leave unreadable images out instead of stopping at the first.")
    task: str | None = option(
        metavar="NAME",
        help="What the network is for: classification (the default), segmentation, or a class of your own, as "
        "path/to/file.py:Name, which runs that file.",
        complete=_tasks,
    )
    task_args: str | None = option(metavar="KEY=VALUE,...", help="Arguments of the task.")

    @property
    def given(self) -> bool:
        """True where there is data: named, or brought by a task."""
        return self.data is not None or self.of_task

    @property
    def of_task(self) -> bool:
        """True where a task other than the classification of images opens the data."""
        return self.task is not None and self.task != "classification"

    @property
    def named(self) -> str | None:
        """What people call the data; None where there is none."""
        if not self.of_task:
            return self.data
        args = f" ({self.task_args})" if self.task_args else ""
        return f"{self.task}{args}" + (f" on {self.data}" if self.data else "")

    def check(self, *, needed: bool = False) -> None:
        """Raise `InputError`, before torch is imported, for a path that leads nowhere, or where `needed` for none."""
        self._check_task()
        if needed and not self.given:
            raise InputError("no data given", hint="say which with --data digits, a folder or a torchvision data set")
        if self.data is not None and len(Path(self.data).parts) > 1 and not os.path.lexists(self.data):
            raise InputError(f"there is no folder {self.data}")

    def _check_task(self) -> None:
        from prunekit.tasks import registry

        if self.task is None or not self.of_task:
            if self.task_args is not None:
                raise InputError("--task-args is for a task", hint="name it with --task")
            return
        if not registry.is_code(self.task) and self.task not in registry.names():
            raise unknown_name("task", self.task, registry.names())
        file = self.task.rpartition(":")[0]
        if file.endswith(".py") and not os.path.lexists(file):
            raise InputError(f"there is no file {file}")
        for flag, value in (("--data-root", self.data_root), ("--skip-bad", self.skip_bad)):
            if value:
                raise InputError(f"{flag} is for images to classify", hint="--task-args reach the task")

    def read_task(self, spec: InputSpec | None) -> Task:
        """Return the task of --task for a network that reads `spec`.

        Raises:
            InputError: It cannot be made.
        """
        from prunekit.models import parse_args
        from prunekit.tasks import registry

        args = parse_args(self.task_args) if self.task_args else {}
        return registry.get(str(self.task), data=self.data, args=args).reading(spec)

    def open(
        self,
        output: Output,
        split: Split,
        spec: InputSpec | None,
        reading: ReadingOptions,
        *,
        lazy: bool = False,
    ) -> Examples:
        """Return the examples of `split`; images prepared as `spec` says, with a warning where some were left out.

        Images are resized only where `--input-size` was given, or where they come from a folder. For a few of them,
        `lazy` spares decoding the others.

        Raises:
            InputError: There is no `--data`, or it cannot be read.
        """
        self.check(needed=True)
        if self.of_task:
            return self.read_task(spec).open(split)
        from prunekit.data import open_data

        assert self.data is not None
        self._warn_of_namesake(output)
        images = open_data(
            self.data,
            split,
            root=self.data_root,
            input_spec=spec,
            skip_bad=self.skip_bad,
            resize=reading.input_size is not None,
            lazy=lazy,
        )
        if images.skipped:
            output.warn(f"{counted(len(images.skipped), 'unreadable image')} left out, the first: {images.skipped[0]}")
        if spec is not None and spec.assumed:
            used = images.input_spec
            mean, std = (",".join(f"{value:g}" for value in values) for values in (used.mean, used.std))
            output.warn(
                f"nobody said how images are normalised for this network; assumed: --mean {mean} --std {std}. With "
                "others than in training its accuracy is wrong; stated once, they are remembered"
            )
        return images

    def images(
        self, output: Output, split: Split, spec: InputSpec | None, reading: ReadingOptions, *, lazy: bool = False
    ) -> ImageSet:
        """Return labelled images, as `open` does, for what other tasks do not have.

        Raises:
            InputError: Another task was named.
        """
        from prunekit.data import ImageSet

        found = self.open(output, split, spec, reading, lazy=lazy)
        if not isinstance(found, ImageSet):
            raise InputError("this reads labelled images, and --task names another task", hint="leave --task out")
        return found

    def _warn_of_namesake(self, output: Output) -> None:
        """Warn where the name of a data set hides a folder; whoever gives `--data-root` means the data set."""
        from prunekit.data import is_named

        name = str(self.data)
        if self.data_root is None and is_named(name) and Path(name).is_dir():
            output.warn(f"{name} names a data set; the folder here is ./{name}")


@dataclass(frozen=True)
class OutputOptions:
    """Destination of the artefact."""

    out: str | None = option(flag="--output,-o", metavar="PATH", help="The file to write; - for standard output.")
    force: bool = option(False, help="Replace the file if it exists; the same as --if-exists replace.")
    if_exists: str = option(
        "fail", choices=("fail", "replace", "skip"), help="What to do if the file exists; skip ends with status 0."
    )
    dry_run: bool = option(False, help="Show what would be done; write nothing.")

    def __post_init__(self) -> None:
        if self.force and self.if_exists == "skip":
            raise InputError("--force and --if-exists skip contradict each other", hint="leave one of them out")
        if self.if_exists == "replace":
            object.__setattr__(self, "force", True)


def input_spec(reading: ReadingOptions, known: InputSpec | None) -> InputSpec | None:
    """Return the model's input: `known`, with `--input-size`, `--mean` and `--std` taking precedence."""
    size = parse_size(reading.input_size) if reading.input_size is not None else None
    return stated(known, mean=_statistics("mean", reading.mean), std=_statistics("std", reading.std), size=size)


def parse_size(text: str) -> tuple[int, ...]:
    """Parse `224`, `32x48` (height, width) or `3x32x32` (channels first) into numbers."""
    parts = re.split(r"[x,×]", text.strip().lower())
    if not all(part.isdigit() and int(part) > 0 for part in parts) or len(parts) > 3:
        raise InputError(f"--input-size '{text}' is not a size", hint="expected 224, 32x32 or 3x32x32")
    return tuple(int(part) for part in parts)


def _statistics(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--{name} '{text}' is not a list of numbers", hint="expected for example .5,.5,.5") from None


def choose_device(asked: str | None) -> torch.device:
    """Return the requested device, checked; by default a GPU where there is one, else the CPU."""
    from prunekit.devices import chosen

    return chosen(asked)
