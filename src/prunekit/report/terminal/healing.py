"""What healing came to, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.report import numbers

if TYPE_CHECKING:
    from prunekit.healing.heal import Healed
    from prunekit.report.terminal.output import Output


def say_healed(output: Output, healed: Healed) -> None:
    """Say how far the network agrees with its original now; a warning where that was in vain or cut short."""
    on, held_out = healed.images
    before, after = numbers.percent(healed.before), numbers.percent(healed.after)
    output.note(
        f"healed on {numbers.counted(on, 'image')} in {numbers.duration(healed.seconds)}: agrees with the original on "
        f"{after} of {held_out} held out (before {before})"
    )
    if healed.stopped:
        output.note(f"ended before its {numbers.counted(healed.epochs, 'epoch')} were done: {healed.stopped}")
    if healed.after <= healed.before:
        output.warn("healing did not make the network better: give it more images, or more --heal-time")
