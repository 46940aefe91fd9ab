"""Images mixed with each other: a teacher answers for any picture, and a few images make any number of mixed ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.data import ImageSet, seeded

_PARTNERS, _OTHERS, _SHARES = 0, 1, 2  # purposes of random numbers: the last entry of their key


class MixedImages(ImageSet):
    """Images whose views for training are weighted means of two, each augmented by itself.

    The share of the second is uniform between nothing and a half: the label stays that of the first. ("mixup", Zhang et
    al., ICLR 2018, mixes labels too; with the answers of a teacher to the mixed image, Beyer et al., CVPR 2022.)
    """

    @classmethod
    def of(cls, data: ImageSet) -> MixedImages:
        """Return `data` with mixed views."""
        return cls(**{item.name: getattr(data, item.name) for item in dataclasses.fields(data)})

    def views(
        self, batch_size: int, order: Tensor, *, seed: Sequence[int], **options: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield mixed batches for training; image `i` of an epoch has one partner and share, whatever the order."""
        count = len(self)
        partner = torch.randperm(count, generator=seeded(*seed, _PARTNERS))[order.cpu()]
        share = torch.rand(count, generator=seeded(*seed, _SHARES))[order.cpu()] / 2
        first = super().views(batch_size, order, seed=seed, **options)
        second = super().views(batch_size, partner, seed=(*seed, _OTHERS), **options)
        for (images, labels), (others, _), shares in zip(first, second, torch.split(share, batch_size), strict=True):
            weights = shares.to(images).view(-1, *[1] * (images.dim() - 1))
            yield torch.lerp(images, others, weights), labels
