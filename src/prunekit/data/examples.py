"""`Examples`: one split of a data set, whatever it is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from prunekit.data.randomness import seeded

if TYPE_CHECKING:
    from typing_extensions import Self

    from prunekit.spec import InputSpec


class Examples(ABC):
    """One split of a data set: it has a size, yields batches, and can be divided.

    Attributes:
        name: What people call the data set.
        split: "train", "val" or "test".
        noun: What people call one of them.
        held_out: Whether these are a part of those for training, because the set has no others to validate on.
        input_spec: What a network reads of them, shape and normalisation; None where a task does not say.

    Examples:
        >>> import prunekit as pk
        >>> digits: pk.Examples = pk.open_data("digits", "train")
        >>> len(digits), len(digits.sample(100)), digits.noun
        (1264, 100, 'image')
    """

    noun: ClassVar[str] = "example"
    name: str
    split: str
    held_out: bool
    input_spec: InputSpec | None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def subset(self, index: Tensor | Sequence[int]) -> Self:
        """Return the examples at `index` as a set, in that order."""

    @abstractmethod
    def batches(
        self,
        batch_size: int = 256,
        *,
        device: torch.device | str = "cpu",
        order: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Any]:
        """Yield batches on `device`, any nest of tensors each; the last one may be smaller.

        Args:
            batch_size: Examples per batch.
            device: The device of the batches.
            order: Indices of the examples to visit; by default all, in their order.
            dtype: The type of floating-point numbers in them.
        """

    def sample(self, count: int, *, seed: int = 0) -> Self:
        """Return a random sample of `count` examples without replacement, or all where there are fewer."""
        return self.subset(torch.randperm(len(self), generator=seeded(seed))[:count])

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
    ) -> Iterator[Any]:
        """Yield batches for training, which a set may augment; by default the plain ones, in `order`.

        Args:
            batch_size: Examples per batch.
            order: Indices of the examples to visit.
            seed: Of the augmentation: the same seed and example give the same view.
            augment: The augmentation that was asked for; "auto" leaves it to the set.
            device: The device of the batches.
            channels_last: Yield images in the channels-last memory format.
            dtype: The type of floating-point numbers in them.
        """
        del seed, augment, channels_last
        return self.batches(batch_size, device=device, order=order, dtype=dtype)

    def resident(self, device: torch.device) -> Self:
        """Return the set on the GPU where it can be and fits; otherwise unchanged."""
        del device
        return self

    def identity(self) -> bytes:
        """Return what tells these examples from others, wherever they lie."""
        return f"{type(self).__name__} {len(self)}".encode()
