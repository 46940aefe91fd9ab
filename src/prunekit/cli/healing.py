"""Healing after a surgery, for the commands of methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.cli.framework.options import option
from prunekit.cli.models import STREAM
from prunekit.cli.times import read_seconds
from prunekit.errors import InputError, Interrupted

if TYPE_CHECKING:
    from torch import nn

    from prunekit.data import ImageSet
    from prunekit.healing.heal import Healed

HEALING = "Healing (without labels)"


@dataclass(frozen=True)
class HealOptions:
    """Whether the pruned network is healed, and for how long."""

    heal: bool = option(
        False,
        help="Bring the pruned network closer to its original, on the --calibration images and without their labels.",
    )
    heal_time: str = option("10m", metavar="TIME", help="Time for --heal, such as 90s, 10m or 1h.")

    def check(self, target: str, *, data: bool, tunes: bool, searches: bool, resume: bool, force: bool) -> None:
        """Raise `InputError` for flags that exclude each other, and for a state of another run in the way."""
        read_seconds(self.heal_time, "--heal-time")
        if not self.heal:
            return
        if not data:
            raise InputError("healing needs images", hint="say which with --data; their labels are not read")
        if tunes:
            raise InputError(
                "--heal and --epochs are two ways to learn from the original: without labels, and with them",
                hint="leave one of them out; with labels, --epochs comes further",
            )
        if searches:
            raise InputError("--max-drop searches without healing", hint="prune to the size that it finds with --heal")
        state = state_of(target)
        if state is not None and state.exists() and not (resume or force):
            raise InputError(f"{state} holds an unfinished run", hint="--resume goes on with it, --force starts anew")


def state_of(target: str) -> Path | None:
    """Return the file that holds the state of a healing while it lasts; None for standard output."""
    return None if target == STREAM else Path(target).with_suffix(".heal")


def healed(
    options: HealOptions,
    model: nn.Module,
    original: nn.Module,
    images: ImageSet,
    target: str,
    *,
    device: str,
    resume: bool,
) -> Healed:
    """Heal a pruned network; its state stays beside `target` where that is interrupted.

    Raises:
        InputError: The images do not fit, or the time is too short.
        Interrupted: A signal stopped it.
    """
    from prunekit.healing.config import HealConfig
    from prunekit.healing.heal import heal

    state = state_of(target)
    going_on = resume and state is not None and state.exists()
    if state is not None and not going_on:
        state.unlink(missing_ok=True)
    config = HealConfig(seconds=read_seconds(options.heal_time, "--heal-time"), device=device)
    try:
        found = heal(model, original, images, config, state_path=state, resume=going_on)
    except Interrupted as stopped:
        raise Interrupted("interrupted while healing; nothing was written", hint=stopped.hint) from None
    if state is not None:
        state.unlink(missing_ok=True)
    return found
