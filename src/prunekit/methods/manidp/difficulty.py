"""Gates that foresee how hard an image is, as far as what they read tells, and leave more channels to the hard ones.

How hard an image is, the entropy of the network's own answers says: no labels are read. Early in a network a gate
foresees it badly, late well; the better it does, the more it makes of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.devices import device_of, precise
from prunekit.nn.gated import GatedConv, gated_layers
from prunekit.nn.norms import drop_norms
from prunekit.surgery.execution.hooks import hooked

_RIDGE = 1e-2  # of the mean second moment of what a gate reads
_MOST = 0.25  # of half the range of saliencies: who closes much at once breaks the network for easy images
_CHUNK = 250  # images at a time


@torch.no_grad()
def foresee(gated: nn.Module, images: Tensor, ease: float) -> None:
    """Let the gates of a trained network guess anew how hard `images` `(N, C, H, W)` are, **in place**.

    Training moves the features that gates read, and guesses made before it grow stale. Each layer keeps as many
    channels of these images as before; hard ones keep more of them, easy ones fewer, by `ease` (1 is moderate). Budgets
    that are stored belong to the gates as they were, and go.
    """
    training = gated.training
    gated.eval()
    images = images.to(device_of(gated))
    logits = torch.cat([gated(batch) for batch in torch.split(images, _CHUNK)])
    wanted = hardness(logits)

    def guess(layer: Any, args: tuple[Tensor, ...]) -> None:
        read = layer.gate.hidden(args[0].flatten(2).mean(2))
        below = float(precise(layer.gate.excite(read) < layer.threshold).mean())
        lean(layer, read, wanted, ease)
        ordered = layer.gate.excite(read).flatten().sort().values
        layer.threshold.copy_(ordered[min(len(ordered) - 1, int(below * len(ordered) + 1e-6))])
        layer.budgets.clear()

    with hooked(layer.register_forward_pre_hook(guess) for _, layer in gated_layers(gated)):
        gated(images)
    drop_norms(gated)
    gated.train(training)


def hardness(logits: Tensor) -> Tensor:
    """Return the log of the entropy of the answers, `(N, classes, ...)` -> `(N,)`, on average over their places."""
    logits = precise(logits)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    return (entropy.flatten(1).mean(1) if entropy.dim() > 1 else entropy).add(1e-6).log()


def lean(layer: GatedConv, read: Tensor, hardness: Tensor, ease: float) -> Tensor:
    """Let a gate raise all saliencies of an image the harder it takes it to be, in place of what all had in common so
    far; gives by how much, `(N,)`, with mean 0. `read` `(N, hidden)` is what its hidden layer gives.

    A ridge regression of `hardness` on what the gate reads, scaled to a deviation of `min(1/4, ease * R^4)` times half
    the range of the channels' saliencies, with `R^2` the share of the variance that it explains: a poor guess had
    better change nothing.
    """
    excite, middle = layer.gate.excite, read.mean(0)
    common = excite.weight.mean(0)
    excite.bias.add_(middle @ common)
    excite.weight.sub_(common)
    x = precise(read - middle)
    y = (hardness - hardness.mean()).to(x)
    moments = x.t() @ x / len(x)
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean() + 1e-12)
    slope = torch.linalg.solve(moments, x.t() @ y / len(x))
    guess = x @ slope
    explained = (1 - (y - guess).square().sum() / y.square().sum().clamp_min(1e-12)).clamp(0, 1)
    spread = math.sqrt(3) * precise(excite(middle).std())  # half of their range, if they are spaced evenly
    slope *= spread * (ease * explained.square()).clamp(max=_MOST) / guess.std().clamp_min(1e-12)
    excite.weight.add_(slope)
    excite.bias.sub_((precise(middle) @ slope).to(excite.bias))
    lift: Tensor = x @ slope
    return lift
