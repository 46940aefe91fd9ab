"""A gated network watched over images: what its gates say, what it keeps, costs and answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit.devices import device_of
from prunekit.methods.manidp.costs import DynamicCost
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import GatedConv
from prunekit.progress import counter
from prunekit.surgery.execution.hooks import hooked


@dataclass(frozen=True)
class Record:
    """Record of what was seen, image by image, on the CPU.

    `kept` `(N, layers)` counts the channels each image kept, `used` holds for each layer how many images kept each
    channel, `macs` `(N,)` is their cost without gates, `losses` `(N,)` the cross-entropy in nats and `correct` `(N,)`
    whether the answer was right; both are empty where no labels were given. `saliencies` holds `(N, c)` a layer when
    they were asked for.
    """

    kept: Tensor
    used: tuple[Tensor, ...]
    macs: Tensor
    losses: Tensor
    correct: Tensor
    saliencies: tuple[Tensor, ...] = ()

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 to 1."""
        return float(self.correct.float().mean())

    @property
    def mean_macs(self) -> float:
        """The mean cost of an image."""
        return float(self.macs.mean())


def kept_share(record: Record, cost: DynamicCost) -> float:
    """Return the share of a layer's channels, 0 to 1, that images keep on average over the layers."""
    return float((record.kept.double() / torch.tensor(cost.channels, dtype=torch.float64)).mean())


@torch.no_grad()
def observe(
    view: GatedView,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    saliencies: bool = False,
) -> Record:
    """Run the network, in the mode it is in, over batches of images `(n, C, H, W)` and labels `(n,)`, of any device."""
    device = device_of(view.model)
    model, cost, layers = view.model, view.cost, view.layers.values()
    kept: list[Tensor] = []
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    stored: list[list[Tensor]] = [[] for _ in layers]
    count, done = counter("watching the gates"), 0
    used = [torch.zeros(width, dtype=torch.int64) for width in cost.channels]
    with watched(layers) as seen:
        for images, labels in batches:
            images, labels = images.to(device), None if labels is None else labels.to(device)
            output = model(images)
            on = [layer.kept(pi) > 0 for layer, pi in zip(layers, seen, strict=True)]
            kept.append(torch.stack([mask.sum(1) for mask in on], 1).cpu())
            for number, (mask, pi) in enumerate(zip(on, seen, strict=True)):
                used[number] += mask.sum(0).cpu()
                if saliencies:
                    stored[number].append(pi.float().cpu())
            seen.clear()
            done += len(images)
            count(done, 0)  # the number of batches is unknown
            if labels is not None:
                logits = output.float()
                losses.append(F.cross_entropy(logits, labels, reduction="none").cpu())
                correct.append((logits.argmax(1) == labels).cpu())
    counts = torch.cat(kept)
    return Record(
        kept=counts,
        used=tuple(used),
        macs=cost.macs(counts),
        losses=torch.cat(losses) if losses else torch.zeros(0),
        correct=torch.cat(correct) if correct else torch.zeros(0, dtype=torch.bool),
        saliencies=tuple(torch.cat(parts) for parts in stored) if saliencies else (),
    )


def unlabelled(batches: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[tuple[Tensor, None]]:
    """Yield the images of batches alone, where their labels may be of other classes than the network's."""
    return ((images, None) for images, _ in batches)


@contextlib.contextmanager
def watched(layers: Iterable[GatedConv]) -> Iterator[list[Tensor]]:
    """Yield a list that gets the saliencies `(N, c)` of each layer in turn, whenever the network runs inside."""
    seen: list[Tensor] = []
    with hooked(layer.gate.register_forward_hook(lambda _, __, pi: seen.append(pi)) for layer in layers):
        yield seen
