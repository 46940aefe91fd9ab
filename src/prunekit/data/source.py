"""`open_data`: one name for every place that images come from."""

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
) -> ImageSet:
    """The images of one split of `source`.

    `source` is "digits" (bundled), a torchvision data set by name (with `root`, the folder that it lies in or
    may be downloaded to), or a folder with `train/` and `val/` or `test/`, or the classes themselves, in it
    (`folder.folder` says how a missing split is filled). `input_spec` says the shape and normalisation that
    the network expects; what it leaves open, the data set decides. `skip_bad` leaves unreadable files out and
    lists them in `ImageSet.skipped`. Pictures in folders are always brought to the network's size; those of
    data sets whose images are all of one shape only with `resize`.

    Raises `InputError` for an unknown name, a folder without images or with one class, an unreadable image, or
    images of another shape than the network reads.
    """
    if split not in get_args(Split):
        raise unknown_name("split", split, get_args(Split))
    name, path = plain(str(source)), Path(source)
    if isinstance(source, str) and name == "digits":
        return digits(split, input_spec, resize=resize)
    if isinstance(source, str) and name in names():
        return named(name, split, None if root is None else Path(root), input_spec, resize=resize)
    if path.is_dir():
        try:
            return folder(path, split, input_spec, skip_bad=skip_bad)
        except OSError as error:
            raise InputError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    if path.exists():
        raise InputError(f"{path} is a file", hint="expected a name, or a folder with one sub-folder a class")
    if isinstance(source, Path) or len(path.parts) > 1 or path.is_absolute():
        raise InputError(f"there is no folder {path}")
    raise unknown_name("data set", str(source), names())
