"""Every error that prunekit raises on purpose, in one tree.

    PrunekitError                 exit status
    ├── InputError                2    a bad file, flag, name, data set or model
    │   └── TrainingError         2    a run that cannot go on (NaN loss, out of memory, other settings)
    ├── SurgeryError              3    the surgery was refused; nothing was written
    ├── CheckFailed               1    a check the user asked for did not hold
    └── Interrupted               130  stopped by a signal, after the state was saved

Anything else that escapes is a bug of ours: exit status 70.

Each carries a message (what was found, what was expected) and, where it helps, a `hint` (what to do).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PrunekitError(Exception):
    """Base class: `message` says what is wrong and where, `hint` what to do about it.

    Attributes:
        message: What was found, and what was expected.
        hint: What to do about it, or None.
        exit_code: The exit status of a command that ends with it.

    Examples:
        >>> import prunekit as pk
        >>> try:
        ...     pk.load("prunekit:resnet21")
        ... except pk.PrunekitError as error:
        ...     print(error.message, error.exit_code, sep="; ")
        unknown architecture 'resnet21'; 2
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InputError(PrunekitError):
    """A file, a flag, a name, a data set or a model cannot be used.

    Examples:
        >>> import prunekit as pk
        >>> try:
        ...     pk.slim(pk.load("prunekit:vgg_digits"), ratio=2)
        ... except pk.InputError as error:
        ...     print(error.message)
        a ratio must lie between 0 and 1, both excluded; found 2
    """


class TrainingError(InputError):
    """A training run cannot start or go on.

    Examples:
        >>> import prunekit as pk
        >>> digits = pk.open_data("digits", "train")
        >>> config = pk.TrainConfig(epochs=1, optimizer="adamw", sparsity=1e-3)
        >>> try:
        ...     pk.train(pk.load("prunekit:vgg_digits"), config, digits)
        ... except pk.TrainingError as error:
        ...     print(error.hint)
        use --proximal, or --optimizer sgd
    """


class SurgeryError(PrunekitError):
    """A plan cannot be applied, or its result is not the network that was intended.

    Examples:
        >>> import prunekit as pk
        >>> try:
        ...     pk.apply(pk.load("prunekit:vgg_digits"), pk.Plan([pk.Keep("fc", [0])]))
        ... except pk.SurgeryError as error:
        ...     print(error.message)
        channel 1 of group 'fc' cannot be removed: the model's output
    """

    exit_code = 3


class CheckFailed(PrunekitError):
    """A check that the user asked for, such as a least accuracy, did not hold.

    Examples:
        A check of your own, which ends a command as prunekit's do:

        >>> import prunekit as pk
        >>> found = pk.evaluate(pk.load("prunekit:vgg_digits"), pk.open_data("digits", "test"))
        >>> if found.accuracy < 0.9:
        ...     raise pk.CheckFailed("the network names too few images", hint="train it first")
        Traceback (most recent call last):
        prunekit.errors.CheckFailed: the network names too few images
        train it first
    """

    exit_code = 1


class Interrupted(PrunekitError):
    """A signal stopped the work after its state was saved.

    Examples:
        >>> import os, signal, prunekit as pk
        >>> digits = pk.open_data("digits", "train")
        >>> def stop(event):
        ...     if isinstance(event, pk.StepEvent):
        ...         os.kill(os.getpid(), signal.SIGTERM)
        >>> config = pk.TrainConfig(epochs=1, device="cpu", log_every=1)
        >>> try:
        ...     pk.train(pk.load("prunekit:vgg_digits"), config, digits, state_path="run.state", on_event=stop)
        ... except pk.Interrupted:
        ...     print("epoch", pk.TrainState.load("run.state").epoch)
        epoch 0
    """

    exit_code = 130


class Noted(UserWarning):
    """Something that was decided for the user and is no reason to worry: a command shows it as a note."""


def counted(value: int, noun: str) -> str:
    """Return a number with its noun: 1 image, 2 images, 1,264 images."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return an `InputError` for an unknown name that suggests the nearest ones."""
    options = sorted(known)
    starting = [option for option in options if name and option.lower().startswith(name.lower())]
    close = starting[:3] or difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        hint = "did you mean " + " or ".join(close) + "?"
    else:
        shown = ", ".join(options[:20])
        hint = f"known: {shown}" + (f", and {len(options) - 20} more" if len(options) > 20 else "")
    return InputError(f"unknown {kind} '{name}'", hint=hint)
