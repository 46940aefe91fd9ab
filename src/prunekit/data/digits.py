"""The bundled data set: 1,797 handwritten digits of 8×8 pixels (UCI, CC BY 4.0; see DIGITS.md)."""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch

from prunekit.data.images import ImageSet
from prunekit.data.pictures import from_arrays
from prunekit.data.shapes import fit_spec
from prunekit.data.splits import every
from prunekit.spec import InputSpec

# Within each class, in the order of the file: positions 4 and 9 of every ten are test images, position 7
# validation.
_TENTHS = {"train": frozenset({0, 1, 2, 3, 5, 6, 8}), "val": frozenset({7}), "test": frozenset({4, 9})}
SPEC = InputSpec((1, 8, 8), (0.3051,), (0.376,))
CLASSES = tuple(str(digit) for digit in range(10))


def digits(split: str, asked: InputSpec | None, *, resize: bool = True) -> ImageSet:
    """Return the digits of `split`: 1,264 train, 178 val, 355 test, the same share of each class."""
    with resources.files("prunekit.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        grey, labels = arrays["images"], torch.from_numpy(arrays["labels"].astype(np.int64))
    # Stored as counts of dark pixels in blocks of 4×4, 0 to 16.
    images = torch.from_numpy((grey.astype(np.uint16) * 255 + 8) // 16).to(torch.uint8)[:, None]
    index = every(labels, _TENTHS[split])
    spec = fit_spec(asked, SPEC, fixed=not resize)
    return from_arrays("digits", split, images[index], labels[index], CLASSES, spec, mirrors=False)
