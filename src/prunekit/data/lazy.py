"""Pictures that are decoded on demand, by threads (Pillow releases the interpreter's lock meanwhile)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from prunekit.data.prepare import prepare, prepare_crop

_AHEAD = 3  # batches decoded in advance


class LazyImages:
    """Stand-in for a `(N, C, H, W)` uint8 tensor: indexing it opens, decodes and resizes the pictures asked for.

    `open_picture(i)` opens picture `i` and raises `InputError` where it cannot be read.
    """

    def __init__(
        self,
        open_picture: Callable[[int], Image],
        index: Tensor,
        shape: tuple[int, ...],
        *,
        workers: int | None = None,
    ) -> None:
        self._open = open_picture
        self._index = index
        self._workers = workers or min(16, os.cpu_count() or 1)
        self.shape = (len(index), *shape)

    def __len__(self) -> int:
        return len(self._index)

    def subset(self, index: Tensor) -> LazyImages:
        """Return the pictures at `index`, still unread."""
        return LazyImages(self._open, self._index[index], self.shape[1:], workers=self._workers)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the decoded pictures at `index`, `(n, C, H, W)`."""
        return self.gather(self.start(index, None))

    def start(self, index: Tensor, draws: Tensor | None) -> list[Future[np.ndarray]]:
        """Start to decode the pictures at `index` or, given `(n, 5)` draws, random crops of them."""
        places = self._index[index].tolist()
        if draws is None:
            return [self._pool.submit(self._whole, place) for place in places]
        return [self._pool.submit(self._part, p, row) for p, row in zip(places, draws, strict=True)]

    @staticmethod
    def gather(futures: list[Future[np.ndarray]]) -> Tensor:
        """Wait for the futures of `start` and return their pictures, `(n, C, H, W)`."""
        return torch.from_numpy(np.stack([future.result() for future in futures]))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._workers, thread_name_prefix="prunekit-decode")

    def _whole(self, place: int) -> np.ndarray:
        with self._open(place) as picture:
            return prepare(picture, self.shape[1:])

    def _part(self, place: int, draws: Tensor) -> np.ndarray:
        with self._open(place) as picture:
            return prepare_crop(picture, self.shape[1:], draws)


def ahead(images: LazyImages, parts: Sequence[Tensor], draws: Sequence[Tensor | None]) -> Iterator[Tensor]:
    """Yield the decoded pictures of each part in turn, while the next few parts are being decoded."""
    waiting: deque[list[Future[np.ndarray]]] = deque()
    try:
        for index, rows in zip(parts, draws, strict=True):
            waiting.append(images.start(index, rows))
            if len(waiting) > _AHEAD:
                yield images.gather(waiting.popleft())
        while waiting:
            yield images.gather(waiting.popleft())
    finally:
        for futures in waiting:
            for future in futures:
                future.cancel()
