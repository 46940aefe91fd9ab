"""The settings of `narrow-heads`."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.methods.base import Config, option

PARTS = ("all", "qk", "v")


@dataclass(frozen=True)
class NarrowHeadsConfig(Config):
    """Settings of the narrowing of heads."""

    parts: str = option(
        "all",
        help="What becomes narrower: queries and keys (qk), values (v), or all. Code that has one width for the three "
        "takes all alone.",
        choices=PARTS,
    )
