"""Data sets in folders: `train/`, `val/` or `test/`, each with one sub-folder per class."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from prunekit.data.images import ImageSet
from prunekit.data.pictures import Pictures, UnreadablePictureError
from prunekit.data.shapes import PHOTO, fit_spec, native_spec
from prunekit.data.splits import held_out
from prunekit.errors import InputError
from prunekit.spec import InputSpec

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
# Pillow's own errors are OSErrors; on damaged files its readers let others through, so anything but a bug of
# ours counts.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, Image.DecompressionBombError)


def folder(root: Path, split: str, asked: InputSpec | None, *, skip_bad: bool, lazy: bool) -> ImageSet:
    """Return the images of `split` under `root`.

    `root/<split>/<class>/…` is taken as it is. "test" falls back to `val/`; where there is no `val/`, "val" is every
    tenth training image of each class, which "train" then leaves out. Where `root` holds the classes directly, "test"
    is all of it, and "train" and "val" are parts of it.
    """
    found = _split_folders(root) or {"train": root, "test": root}
    place = _place(root, found, split)
    classes = _classes(found.get("train", place))
    paths, labels = _scan(place, classes)
    held = split != "test" and "val" not in found
    if held:
        index = held_out(labels, split, name=str(place))
        paths, labels = [paths[i] for i in index.tolist()], labels[index]
    spec = fit_spec(asked, asked if asked and asked.mean and asked.std else _native(paths))
    pictures = Pictures(str(root), split, lambda i: open_picture(paths[i]), paths.__getitem__, labels, classes, spec)
    return replace(pictures.image_set(skip_bad=skip_bad, lazy=lazy), held_out=held and split == "val")


def open_picture(path: str) -> Image.Image:
    """Return the decoded picture at `path`; raise `UnreadablePictureError` with the file's name where that fails."""
    try:
        with Path(path).open("rb") as file:
            picture = Image.open(file)
            picture.load()
    except _DAMAGED as error:
        # Pillow names the open file by its repr, but the message gives `path` already.
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error).split("\n")[0]
        raise UnreadablePictureError(
            f"{path} cannot be read as a picture: {reason}", hint="--skip-bad goes on without such files"
        ) from error
    return picture


def _split_folders(root: Path) -> dict[str, Path]:
    found = ((split, root / name) for split, names in _SPLITS.items() for name in names)
    return {split: place for split, place in found if place.is_dir()}


def _place(root: Path, found: dict[str, Path], split: str) -> Path:
    """Return the folder that holds the images of `split`, alone or among those of another split."""
    other = {"test": "val", "val": "train", "train": "train"}[split]
    if split in found or other in found:
        return found.get(split) or found[other]
    there = ", ".join(f"{place.name}/" for place in found.values())
    raise InputError(
        f"{root} has {there} but no {split}/",
        hint="expected train/ and val/ or test/, one sub-folder a class",
    )


def _classes(place: Path) -> tuple[str, ...]:
    names = sorted(e.name for e in os.scandir(place) if e.is_dir() and not e.name.startswith("."))
    if len(names) >= 2:
        return tuple(names)
    found = f"only one class, {names[0]}/" if names else "no sub-folders"
    raise InputError(f"{place} holds {found}", hint="expected at least two, one sub-folder a class")


def _scan(place: Path, classes: tuple[str, ...]) -> tuple[list[str], Tensor]:
    strange = sorted(set(_classes(place)) - set(classes))
    if strange:
        raise InputError(f"{place} holds classes that train/ does not: {', '.join(strange[:5])}")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = _files(place / name)
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise InputError(f"no images under {place}", hint=f"expected files {' '.join(sorted(SUFFIXES))}")
    if len(set(labels)) == 1:
        raise InputError(f"all images under {place} are of one class, {classes[labels[0]]}")
    return paths, torch.tensor(labels)


def _files(place: Path) -> list[str]:
    found = [
        str(Path(directory) / name)
        for directory, _, names in os.walk(place)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    ]
    return sorted(found)


def _native(paths: list[str]) -> InputSpec:
    """Return the input that a sample of pictures from all classes agrees on, or ImageNet's where they differ."""
    shapes = set()
    for path in paths[:: max(1, len(paths) // 20)]:
        try:
            with Image.open(path) as picture:
                grey = picture.mode in ("1", "L") or picture.mode.startswith("I")
                shapes.add((1 if grey else 3, picture.height, picture.width))
        except _DAMAGED:
            continue  # reported, with its name, when the pictures are decoded
    return native_spec(*(shapes.pop() if len(shapes) == 1 else PHOTO))
