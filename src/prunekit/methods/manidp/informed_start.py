"""An informed start for gates: they close what the network needs least, and its layers are refitted to do without.

Where every saliency starts as one, training has to find out which channels go while the network breaks for each wrong
guess. Here the order comes from the network itself: how far its answers move with a channel's scale, over some images.
Gates foresee how hard an image is (see `foresight`) and leave more channels to the hard ones. Then every layer in turn
is refitted, by the least squares that restore pruned networks, to give from the masked inputs what the original gave.
No labels are read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from prunekit.devices import precise, sums_in
from prunekit.methods.manidp.difficulty import hardness, lean
from prunekit.methods.manidp.keep_ratios import shares
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.gated import GatedConv, gated_layers
from prunekit.progress import counter
from prunekit.restoration.frontier import Frontier
from prunekit.restoration.layerwise_refit import refit_in_order
from prunekit.restoration.memory import MEMORY, read_memory
from prunekit.restoration.refit_targets import Site
from prunekit.surgery.copying import copied
from prunekit.surgery.execution.hooks import hooked

IMAGES = 1000  # that an informed start looks at
SPREAD = 0.1  # saliencies start evenly spaced in 1 +- SPREAD: an order, and hardly a change of scale
ROWS = 16_000  # positions of a layer's output that its refit learns from
RIDGE = 3e-2  # of the mean second moment of a layer's inputs
_DIRECTIONS = 4  # in which the movement of the answers is measured
_CHUNK = 250  # images at a time


def inform(view: GatedView, images: Tensor, keep: float, ease: float = 0.0, seed: int = 0) -> dict[str, float]:
    """Order the channels of each gate, close some, and refit its layers, **in place**.

    The network then costs about what the share `keep` of each layer's channels costs. Returned is the share of each
    layer, by name: the more, the more its channels move the answers for each MAC.

    The network is as it was made, and so computes what the network without gates does; `images` `(N, C, H, W)` are
    normalised as it reads them. With `ease` zero every image keeps the same channels; the larger it is, the fewer the
    easy ones keep.
    """
    gated = view.model
    training = gated.training
    gated.eval()
    strengths = answers_moved(gated, images, seed)
    with torch.no_grad():
        read, hard = _looked_at(gated, images)
        sites = _sites(gated)
        original = copied(gated)
        kept = shares(strengths, view.cost, keep)
        for name, layer in view.layers.items():
            pi = _set_order(layer, strengths[name])
            pi = pi + lean(layer, read[name], hard, ease)[:, None]
            ordered = pi.flatten().sort(descending=True).values
            layer.threshold.copy_(ordered[math.ceil(kept[name] * len(ordered) - 1e-6) - 1])
        frontier = Frontier(original, gated, view.graph, sites, images, read_memory(MEMORY))
        refit_in_order(frontier, gated, sites, rows=ROWS, ridge=RIDGE, seed=seed)
    gated.train(training)
    return kept


def answers_moved(gated: nn.Module, images: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Return, for each gated layer `(channels,)`, how far the logits move with a channel's saliency: the mean square,
    over images and random directions `v`, of `d(v . logits) / d pi`.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = dict(gated_layers(gated))
    sums = {name: torch.zeros(()) for name in layers}
    count, done = counter("measuring channels"), 0
    with _leaves(layers) as saliencies:
        for batch in torch.split(images, _CHUNK):
            count(done, len(images))
            done += len(batch)
            logits = gated(batch)
            for left in reversed(range(_DIRECTIONS)):
                direction = torch.randn(logits.shape, generator=generator).to(logits)
                moved = torch.autograd.grad(
                    (direction * logits).sum(), list(saliencies.values()), retain_graph=left > 0
                )
                for name, slope in zip(saliencies, moved, strict=True):
                    sums[name] = sums[name].to(slope.device) + precise(slope).square().sum(0)
    return sums


@contextlib.contextmanager
def _leaves(layers: dict[str, GatedConv]) -> Iterator[dict[str, Tensor]]:
    """Make saliencies leaves of the graph of gradients inside; yield those of the last batch."""
    found: dict[str, Tensor] = {}

    def leaf(_: nn.Module, __: Any, pi: Tensor, *, name: str) -> Tensor:
        found[name] = pi.detach().requires_grad_()
        return found[name]

    with hooked(layer.gate.register_forward_hook(partial(leaf, name=name)) for name, layer in layers.items()):
        yield found


def _looked_at(gated: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return what each gate's hidden layer gives, `(N, hidden)`, and the log of the answers' entropy, `(N,)`."""
    read: dict[str, list[Tensor]] = {}

    def keep(gate: Any, args: tuple[Tensor, ...], _: Tensor, *, name: str) -> None:
        read.setdefault(name, []).append(gate.hidden(args[0].flatten(2).mean(2)))

    with hooked(layer.gate.register_forward_hook(partial(keep, name=name)) for name, layer in gated_layers(gated)):
        logits = torch.cat([gated(batch) for batch in torch.split(images, _CHUNK)])
    return {name: torch.cat(parts) for name, parts in read.items()}, hardness(logits)


def _set_order(layer: GatedConv, strength: Tensor) -> Tensor:
    """Set evenly spaced saliencies in the order of `strength`, undone by the batch norm."""
    bias, norm = layer.gate.excite.bias, layer.norm
    assert isinstance(norm, _NormBase)
    steps = torch.linspace(1 - SPREAD, 1 + SPREAD, len(bias), dtype=sums_in(bias.device), device=bias.device)
    pi = torch.empty_like(steps).scatter_(0, strength.argsort(stable=True), steps).to(bias)
    bias.copy_(pi)
    for values in (norm.weight, norm.bias):
        if values is not None:
            values.div_(pi.to(values))
    return pi


def _sites(gated: nn.Module) -> list[Site]:
    """Return the convolutions and linear layers that are no part of a gate."""
    layers = dict(gated_layers(gated))
    gates = {id(part) for layer in layers.values() for part in layer.gate.modules()}
    norms = {id(layer.layer): f"{name}.norm" for name, layer in layers.items() if _keeps_mean(layer.norm)}
    return [
        Site(name, kept=None, norm=norms.get(id(module)), join=None)
        for name, module in gated.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and id(module) not in gates
    ]


def _keeps_mean(norm: nn.Module) -> bool:
    return isinstance(getattr(norm, "running_mean", None), Tensor)
