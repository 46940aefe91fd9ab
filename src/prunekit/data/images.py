"""`ImageSet`: labelled images that yield normalised batches."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunekit.data.augment import Augmentation, augmentation
from prunekit.data.examples import Examples
from prunekit.data.lazy import LazyImages, ahead
from prunekit.data.randomness import seeded
from prunekit.devices import free_memory
from prunekit.errors import InputError
from prunekit.progress import counter
from prunekit.spec import InputSpec, classes_of


@dataclass(frozen=True, eq=False)
class ImageSet(Examples):
    """One split of a data set.

    `images` are uint8, `(N, C, H, W)` with `(C, H, W) == input_spec.shape`: a tensor, or `LazyImages` that
    decode when they are indexed. `labels` are int64, `(N,)`, indices into `classes`. `augment` names the
    augmentation that suits the set. `skipped` lists the files that could not be read and were left out.
    `held_out` images are a part of those for training, because the set has no others to validate on.

    Examples:
        >>> import prunekit as pk
        >>> digits = pk.open_data("digits", "train").sample(100, seed=0)
        >>> images, labels = next(digits.batches(32))
        >>> images.shape, labels.shape, images.dtype
        (torch.Size([32, 1, 8, 8]), torch.Size([32]), torch.float32)
    """

    noun: ClassVar[str] = "image"

    name: str
    split: str
    images: Tensor | LazyImages = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    input_spec: InputSpec
    augment: str = "none"
    skipped: tuple[str, ...] = ()
    held_out: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """True where the images are decoded already."""
        return isinstance(self.images, Tensor)

    def subset(self, index: Tensor | Sequence[int]) -> ImageSet:
        """Return the images at `index` as a set, in that order."""
        index = torch.as_tensor(index, dtype=torch.int64)
        images = self.images
        chosen = images[index.to(images.device)] if isinstance(images, Tensor) else images.subset(index)
        return dataclasses.replace(self, images=chosen, labels=self.labels[index.to(self.labels.device)])

    def relabelled(self, classes: Sequence[str]) -> ImageSet:
        """Return the set with labels that are indices into `classes`, which has the set's own among others, by name.

        Args:
            classes: The names of a classifier's outputs, in their order.

        Raises:
            InputError: A class of the set is not in `classes`, or more than once.

        Examples:
            >>> import prunekit as pk
            >>> digits = pk.open_data("digits", "test")
            >>> backwards = digits.relabelled([str(digit) for digit in range(9, -1, -1)])
            >>> bool((backwards.labels == 9 - digits.labels).all())
            True
        """
        names = tuple(classes)
        if names == self.classes:
            return self
        outputs = torch.tensor(_outputs_of(self.classes, names, self.name), device=self.labels.device)
        return dataclasses.replace(self, labels=outputs[self.labels], classes=names)

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set with images and labels on `device`; lazy images and their labels stay where they are."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        labels = self.labels.to(device) if isinstance(self.images, Tensor) else self.labels
        return dataclasses.replace(self, images=images, labels=labels)

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `(x / 255 - mean) / std` of uint8 images `(N, C, H, W)`, bit for bit as torchvision computes it."""
        out = images.to(dtype).div_(255)
        if self.input_spec.mean:
            mean = torch.tensor(self.input_spec.mean, dtype=dtype, device=images.device)
            std = torch.tensor(self.input_spec.std, dtype=dtype, device=images.device)
            out.sub_(mean[:, None, None]).div_(std[:, None, None])
        return out

    def inputs(self) -> Tensor:
        """Return all images as a network reads them, normalised, `(N, C, H, W)`."""
        count, parts, done = counter("reading images"), [], 0
        for images, _ in self.batches(64):
            parts.append(images)
            done += len(images)
            count(done, len(self))
        return torch.cat(parts)

    def batches(
        self,
        batch_size: int = 256,
        *,
        device: torch.device | str = "cpu",
        order: Tensor | None = None,
        augment: Augmentation | None = None,
        draws: Tensor | None = None,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images `(n, C, H, W)` and labels `(n,)` on `device`; the last batch may be smaller.

        Args:
            batch_size: Images per batch.
            device: The device of the batches.
            order: Indices of the images to visit; by default all, in their order.
            augment: The augmentation; image `i` is changed by row `i` of `draws`.
            draws: Uniform random numbers in [0, 1), `(N, augment.columns)`.
            channels_last: Yield images in the channels-last memory format.
            dtype: The type of the normalised images.

        Lazy images are decoded by worker threads, a few batches ahead.
        """
        order = torch.arange(len(self)) if order is None else order
        for index, pixels in self._pixels(torch.split(order, batch_size) if len(order) else (), augment, draws):
            pixels = pixels.to(device, non_blocking=True)
            if augment is not None and draws is not None and not self._cut_when_decoded(augment):
                pixels = augment.view(pixels, draws[index].to(device, non_blocking=True))
            images = self.normalise(pixels, dtype)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            yield images, self.labels[index.to(self.labels.device)].to(device, non_blocking=True)

    def views(
        self,
        batch_size: int,
        order: Tensor,
        *,
        seed: Sequence[int],
        augment: str = "auto",
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield augmented batches for training, as `batches` does; see `Examples.views`."""
        chosen = augmentation(self.augment if augment == "auto" else augment)
        home = self.labels.device
        return self.batches(
            batch_size,
            device=device,
            order=order.to(home),
            augment=chosen,
            draws=chosen.draws(len(self), seeded(*seed)).to(home),
            channels_last=channels_last,
            dtype=dtype,
        )

    def resident(self, device: torch.device) -> ImageSet:
        """Return the set on the device where it takes at most a quarter of its free memory; otherwise unchanged."""
        if device.type == "cpu" or not isinstance(self.images, Tensor):
            return self
        free = free_memory(device)
        return self.to(device) if free is not None and self.images.nbytes <= free // 4 else self

    def identity(self) -> bytes:
        """Return number, classes, input and labels of the images, not their name: the folder may have moved."""
        what = json.dumps([list(self.classes), self.input_spec.to_json()])
        return what.encode() + self.labels.cpu().numpy().tobytes()

    def _cut_when_decoded(self, augment: Augmentation) -> bool:
        return augment.whole and isinstance(self.images, LazyImages)

    def _pixels(
        self, parts: Sequence[Tensor], augment: Augmentation | None, draws: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.images
        if isinstance(images, Tensor):
            for index in parts:
                yield index, images[index.to(images.device)]
            return
        whole = augment is not None and draws is not None and augment.whole
        rows = [draws[index] if whole and draws is not None else None for index in parts]
        yield from zip(parts, ahead(images, parts, rows), strict=True)


def labelled_for(model: nn.Module, data: ImageSet) -> ImageSet:
    """Return `data` with labels that number the outputs of `model`, by the class names that the model remembers.

    Where it remembers none, the classes of the data are taken for its outputs, in their order.

    Raises:
        InputError: The model has no output, or several, of the name of a class.
    """
    names = classes_of(model)
    return data.relabelled(names) if names else data


def check_classes(outputs: int, data: ImageSet, names: Sequence[str] = ()) -> None:
    """Raise `InputError` unless a classifier fits the classes of `data`.

    Args:
        outputs: The number of its outputs.
        data: Images, labelled for it.
        names: The names of its outputs, where they are known.
    """
    if names and len(names) != outputs:
        raise InputError(
            f"the classifier has {outputs} outputs, and {len(names)} class names are given for them",
            hint="classes (--classes FILE) names each output, in their order",
        )
    if len(data.classes) == outputs:
        return
    others = "give the data set the network was trained on, or a network with as many outputs as classes"
    some = "if these are some of its classes, classes (--classes FILE) says which: the name of each output, in order"
    raise InputError(
        f"{data.name} has {len(data.classes)} classes, labels 0 to {len(data.classes) - 1}, "
        f"but the classifier has {outputs} outputs",
        hint=some if len(data.classes) < outputs else others,
    )


def _outputs_of(classes: Sequence[str], names: Sequence[str], where: str) -> list[int]:
    """Return for each of `classes` the place of its name in `names`.

    Raises:
        InputError: A class has no place, or several; `where` names the data.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    unknown = [name for name in classes if name not in places]
    if unknown:
        raise InputError(
            f"{where} has classes that none of the network's {len(names)} outputs is named after: {_some(unknown)}; "
            f"the outputs are {_some(names)}",
            hint=_nearest(unknown[0], places)
            + "classes (--classes FILE) names the outputs, in their order, as the data names its classes",
        )
    twice = [name for name in classes if len(places[name]) > 1]
    if twice:
        raise InputError(
            f"{where} has the class '{twice[0]}', and {len(places[twice[0]])} outputs of the network have that name",
            hint="classes (--classes FILE) can tell them apart",
        )
    return [places[name][0] for name in classes]


def _some(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"is '{name}' meant to be '{near[0]}'? " if near else ""


def check_input(shape: Sequence[int], data: ImageSet) -> None:
    """Raise `InputError` unless `data` yields images of `shape`, `(C, H, W)`."""
    if tuple(shape) != tuple(data.input_spec.shape):
        raise InputError(
            f"{data.name} gives images of shape {tuple(data.input_spec.shape)}, the network reads {tuple(shape)}",
            hint="say how the images are prepared with --input-size",
        )
