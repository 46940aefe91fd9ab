"""`open_data`: the one entry to every source of images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from prunekit.data.digits import digits
from prunekit.data.folder import folder
from prunekit.data.images import ImageSet
from prunekit.data.named import named, names, plain
from prunekit.errors import InputError, unknown_name
from prunekit.spec import InputSpec

Split = Literal["train", "val", "test"]


def open_data(
    source: str | Path,
    split: Split = "test",
    *,
    root: str | Path | None = None,
    input_spec: InputSpec | None = None,
    skip_bad: bool = False,
    resize: bool = True,
    lazy: bool = False,
) -> ImageSet:
    """Return the images of one split of `source`.

    Args:
        source: "digits" (bundled), the name of a torchvision data set, or a folder that holds `train/` and `val/` or
            `test/`, or the classes directly; `folder.folder` describes how a missing split is filled.
        split: "train", "val" or "test".
        root: The folder of torchvision's data sets, into which they may be downloaded.
        input_spec: Shape and normalisation that the network expects; the data set decides what it leaves open.
        skip_bad: Leave unreadable files out and list them in `ImageSet.skipped`.
        resize: Resize data sets whose images all have one shape; pictures in folders are always resized.
        lazy: Decode pictures when they are asked for, even where all of them fit into memory: for a few of many.

    Raises:
        InputError: The name is unknown, the folder has no images or only one class, an image cannot be read, or the
            images have another shape than the network reads.

    Examples:
        >>> import prunekit as pk
        >>> digits = pk.open_data("digits", "test")
        >>> len(digits), digits.input_spec.shape, digits.classes[:3]
        (355, (1, 8, 8), ('0', '1', '2'))
    """
    if split not in get_args(Split):
        raise unknown_name("split", split, get_args(Split))
    name, path = plain(str(source)), Path(source)
    if isinstance(source, str) and name == "digits":
        return digits(split, input_spec, resize=resize)
    if isinstance(source, str) and name in names():
        return named(name, split, None if root is None else Path(root), input_spec, resize=resize, lazy=lazy)
    if path.is_dir():
        try:
            return folder(path, split, input_spec, skip_bad=skip_bad, lazy=lazy)
        except OSError as error:
            raise InputError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    if path.exists():
        raise InputError(f"{path} is a file", hint="expected a name, or a folder with one sub-folder a class")
    if isinstance(source, Path) or len(path.parts) > 1 or path.is_absolute():
        raise InputError(f"there is no folder {path}")
    raise unknown_name("data set", str(source), names())
