"""Advice on the usual errors of networks."""

from __future__ import annotations

import re

# Messages of torch, and the advice for each.
_SIZES = r"cannot be multiplied|[Ss]izes? of tensor|[Ss]ize mismatch|too small|greater than actual|invalid for input of"
_ADVICE = (
    (
        r"Expected more than 1 (value|spatial element)",
        "a batch norm needs several images at a time: raise --batch-size (which accumulation and processes divide), "
        "and train on a set that has as many",
    ),
    (r"same dtype|expected scalar type|should be the same|dtype mismatch", "bring all its weights to one dtype first"),
    (r"to have \d+ channels", "--input-size says how many channels the images are to have, such as 3x32x32"),
    (_SIZES, "--input-size says how large the images are to be, such as 3x32x32"),
)


def advice(error: Exception) -> str:
    """Return what to do about an error that a network raised."""
    said = str(error)
    found = (advice for pattern, advice in _ADVICE if re.search(pattern, said))
    return next(found, "the error is that of its own code; --debug shows where it was raised")
