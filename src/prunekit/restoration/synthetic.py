"""Restoration on images that are made from nothing but the network: no data file is read.

Dead leaves are brought into the network's own statistics, and then stand for the images that it was trained on: the
pruned network is refitted to them layer by layer, as `calibrate` does. What the pictures still get wrong is taken out
where it shows: during the fit both networks normalise by the pictures' own statistics, so that behind every batch norm
means and variances are those of the training images. Only what the fit changed goes back to the true statistics.

A few images that are at hand stand among the made ones, each in several views: shifted, mirrored where it is in colour,
and mixed with another. What so few of them get wrong about the statistics is taken out likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunekit.data.augment import augmentation
from prunekit.errors import InputError
from prunekit.nn.norms import norms_of
from prunekit.plan import Plan, Refit
from prunekit.restoration.base import Evidence
from prunekit.restoration.calibration import calibrate
from prunekit.restoration.dead_leaves import dead_leaves
from prunekit.restoration.images import MEMORY, Inputs, bytes_per_image, reads_images
from prunekit.restoration.norm_alignment import aligned
from prunekit.surgery import Graph, edit

COUNT = 500
FEW = 100  # given images, up to which these are restored from better than from the images alone
_VIEWS = 5  # of each given image


def refitted_to(
    made: Evidence, model: nn.Module, graph: Graph, plan: Plan, memory: str | int, note: str = "synthetic"
) -> Plan:
    """Return `plan` with refits to the images that were `made`, for `model` with its own statistics.

    `note` is the name of the note that says to how many.
    """
    assert made.images is not None
    found = calibrate(made.model, graph, plan, made.images, memory=memory)
    true, shown = (dict(norms_of(edit(network, plan, graph))) for network in (model, made.model))
    operations = [_moved(op, true, shown) if isinstance(op, Refit) else op for op in found.operations]
    notes = {**found.notes, note: found.notes["calibration"]}
    del notes["calibration"]
    return Plan(operations, notes, found.example)


def _moved(
    refit: Refit, true: dict[str, nn.modules.batchnorm._BatchNorm], made: dict[str, nn.modules.batchnorm._BatchNorm]
) -> Refit:
    """Return a running mean that the fit has shifted, shifted as far from the true one."""
    if "running_mean" not in refit.values:
        return refit
    before, start = made[refit.layer].running_mean, true[refit.layer].running_mean
    assert before is not None
    assert start is not None
    return Refit(refit.layer, {**refit.values, "running_mean": start + refit.values["running_mean"] - before})


def obstacle_to_synthesis(model: nn.Module, graph: Graph) -> str | None:
    """Return why no images can be made for a network, or None."""
    if not reads_images(graph) or graph.example[0].dim() not in (3, 4, 5):
        return "images can only be made for a network with a single input: (N, C, H, W), (N, C, L) or (N, C, D, H, W)"
    if not any(norms_of(model)):
        return "--restore synthetic makes images from batch-norm statistics, and this network holds none"
    return None


def obstacle_to_views(model: nn.Module, graph: Graph) -> str | None:
    """Return why images cannot be varied and mixed with made ones for a network, or None."""
    if not reads_images(graph) or graph.example[0].dim() != 4:
        return "views are made of images, for a network with a single input (N, C, H, W)"
    return obstacle_to_synthesis(model, graph)


def synthesise(model: nn.Module, graph: Graph, *, seed: int = 0, given: Tensor | Inputs | None = None) -> Evidence:
    """Make `COUNT` images for `model`, or as many as would pass at once within `MEMORY` (more take too long), and bring
    its statistics in line with them. Five views of each `given` image `(N, C, H, W)` are among them, as far as there is
    room; all that are given stay.

    Raises:
        InputError: the network does not read one image, or it has no batch norm whose statistics tell of its data.
    """
    reason = (obstacle_to_synthesis if given is None else obstacle_to_views)(model, graph)
    if reason is not None:
        raise InputError(reason, hint="--restore calibrate takes images of your own, with --data")
    like = next(p for p in model.parameters() if p.is_floating_point())
    count = min(COUNT, max(2, MEMORY // bytes_per_image(graph)))
    generator = torch.Generator().manual_seed(seed)
    found = (
        []
        if not isinstance(given, Tensor)
        else [_views(given, max(len(given), min(count, _VIEWS * len(given))), generator)]
    )
    missing = count - sum(map(len, found))
    if missing > 0:
        found.append(dead_leaves(missing, tuple(graph.example[0].shape[1:]), generator).to(like))
    images = torch.cat(found)
    return Evidence(aligned(model, graph, images), images)


def _views(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` views of the images, themselves first: shifted, mirrored in colour, mixed down to a half."""
    change = augmentation("cifar" if images.size(1) == 3 else "shift")

    def varied() -> Tensor:
        return change.view(images, change.draws(len(images), generator).to(images.device))

    found, shape = [images], (len(images), 1, 1, 1)
    while sum(map(len, found)) < count:
        others = varied()[torch.randperm(len(images), generator=generator)]
        found.append(torch.lerp(varied(), others, (torch.rand(shape, generator=generator) / 2).to(images)))
    return torch.cat(found)[:count]
