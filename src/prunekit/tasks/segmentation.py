"""Semantic segmentation: a class for every pixel, from folders of images and masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.errors import InputError
from prunekit.tasks.base import Batch, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunekit.data import Examples
    from prunekit.spec import InputSpec

_IGNORED = 255


@dataclass
class Segmentation(Task):
    """A class for every pixel; a batch is images `(N, C, H, W)` and masks `(N, H, W)`, in which 255 belongs to none.

    The loss is the mean cross-entropy of all pixels plus `dice` times the soft Dice loss, one minus the mean over the
    classes of `2 |A B| / (|A| + |B|)` (Milletari et al., "V-Net", 3DV 2016). The score is the mean over the classes of
    the intersection over union of all pixels; classes that are nowhere, in masks or predictions, do not count.

    Attributes:
        data: A folder with `train/`, `val/` and perhaps `test/`, each with `images/` and `masks/` of the same names.
        dice: The weight of the Dice loss.
        spec: What the network reads; by default images as they are.

    Examples:
        >>> import torch, prunekit as pk
        >>> batch = torch.zeros(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.int64)
        >>> pk.Segmentation().scores(torch.nn.Conv2d(3, 4, 1).eval(), iter([batch])).keys()
        dict_keys(['mean IoU', 'pixel accuracy'])
    """

    score: ClassVar[str] = "mean IoU"
    unit: ClassVar[str] = "%"

    data: str | None = None
    dice: float = 1.0
    spec: InputSpec | None = None

    def examples(self, split: str) -> Any:
        """Return images with masks."""
        from prunekit.data.masks import masked_folder

        if self.data is None:
            raise InputError("no images to segment", hint="say which with --data: a folder of images and masks")
        return masked_folder(Path(self.data), split, self.spec, self)

    def open(self, split: str) -> Examples:
        """Return the examples of a split."""
        if type(self).examples is Segmentation.examples:
            found: Examples = self.examples(split)
            return found
        return super().open(split)

    def reading(self, spec: InputSpec | None) -> Segmentation:
        """Return the task for a network that reads `spec`."""
        return replace(self, spec=spec)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the pixels that have a class, plus `dice` times the Dice loss."""
        from torch.nn import functional as F

        from prunekit.tasks.nests import called

        scores, masks = _scores(called(model, self.inputs(batch)), batch[1])
        known = masks != _IGNORED
        loss = F.cross_entropy(scores, masks, ignore_index=_IGNORED, reduction="sum") / known.sum().clamp_min(1)
        if not self.dice:
            return loss
        shares = scores.softmax(1) * known[:, None]
        truth = F.one_hot(masks.where(known, 0), scores.shape[1]).movedim(-1, 1) * known[:, None]
        both, sizes = (shares * truth).sum((0, 2, 3)), shares.sum((0, 2, 3)) + truth.sum((0, 2, 3))
        return loss + self.dice * (1 - (2 * both + 1) / (sizes + 1)).mean()

    def scores(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Return `mean IoU` and `pixel accuracy`, both from 0 to 1.

        Raises:
            InputError: No pixel has a class, or one that the network does not know.
        """
        import torch

        from prunekit.tasks.nests import called

        confusion = torch.zeros(0)
        for batch in batches:
            scores, masks = _scores(called(model, self.inputs(batch)), batch[1])
            known, count = masks != _IGNORED, scores.shape[1]
            truth, found = masks[known], scores.argmax(1)[known]
            if truth.numel() and int(truth.max()) >= count:
                raise InputError(f"a mask has the class {int(truth.max())}, and the network knows 0 to {count - 1}")
            pairs = torch.bincount(truth * count + found, minlength=count * count).view(count, count).double().cpu()
            confusion = pairs if not confusion.numel() else confusion + pairs
        if not confusion.sum():
            raise InputError("no pixel of the masks has a class", hint="255 in a mask means that a pixel has none")
        both = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - both
        return {
            "mean IoU": float((both[union > 0] / union[union > 0]).mean()),
            "pixel accuracy": float(both.sum() / confusion.sum()),
        }

    def losses(self, output: Any, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of each image, `(N,)`."""
        from torch.nn import functional as F

        scores, masks = _scores(output, batch[1])
        each = F.cross_entropy(scores, masks, ignore_index=_IGNORED, reduction="none").flatten(1).sum(1)
        return each / (masks != _IGNORED).flatten(1).sum(1).clamp_min(1)

    def distance(self, ours: Any, theirs: Any, temperature: float) -> Tensor:
        """Return `T² * KL(theirs / T || ours / T)`, the mean over all pixels."""
        from torch.nn import functional as F

        wanted = (_main(theirs).float() / temperature).log_softmax(1)
        found = (_main(ours).float() / temperature).log_softmax(1)
        each = F.kl_div(found, wanted, reduction="none", log_target=True).sum(1)
        return each.mean() * temperature * temperature


def _scores(output: Any, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return class scores `(N, classes, H, W)`, at least in float32 and as large as the masks, and the masks.

    Raises:
        InputError: The output is none.
    """
    import torch
    from torch.nn import functional as F

    scores = _main(output)
    if not isinstance(scores, torch.Tensor) or scores.dim() != 4 or len(scores) != len(masks):
        shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(output).__name__
        raise InputError(
            f"the network returns {shape}, expected class scores of shape ({len(masks)}, classes, H, W)",
            hint="let its forward return them alone, first in a tuple, or as 'out' or 'logits' of a dictionary",
        )
    scores = scores.float()
    if scores.shape[2:] != masks.shape[1:]:
        scores = F.interpolate(scores, size=masks.shape[1:], mode="bilinear", align_corners=False)
    return scores, masks


def _main(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("out", output.get("logits"))
    return output[0] if isinstance(output, tuple | list) and output else output
