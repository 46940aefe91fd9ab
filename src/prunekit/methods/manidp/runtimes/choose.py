"""Runtimes by name, and networks that run that way."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.errors import InputError, unknown_name
from prunekit.evaluation.latency import in_turns
from prunekit.methods.manidp.config import RUNTIMES
from prunekit.methods.manidp.costs import graph_of
from prunekit.methods.manidp.runtimes.buckets import bucketed
from prunekit.methods.manidp.runtimes.gather import gathered
from prunekit.methods.manidp.runtimes.layout import in_best_layout
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.buckets import NAME
from prunekit.nn.gated import gated_layers, remove_gates
from prunekit.nn.norms import drop_norms
from prunekit.spec import origin_of
from prunekit.surgery import Graph
from prunekit.surgery.editing.batch_norm_folding import fold_batch_norms

_TIMINGS = 15


def accelerate(
    model: nn.Module, runtime: str, *, batch: int = 1, view: GatedView | None = None
) -> tuple[nn.Module, str]:
    """Return a copy of the gated `model` that runs as `runtime` says, for inference with `batch` images at a time, and
    the name of its runtime: with `auto`, of the fastest one, measured here on random images. `view` is what has been
    read of the network, if that is at hand.

    Raises:
        InputError: no such runtime, no gates, or (`buckets`) no sub-networks are stored in the network.
    """
    if runtime not in RUNTIMES:
        raise unknown_name("runtime", runtime, RUNTIMES)
    if not any(gated_layers(model)):
        raise InputError(f"--runtime {runtime} is for networks with gates", hint="prunekit manidp train makes them")
    view = GatedView.of(model) if view is None else view
    if runtime != "auto":
        return _one(view, runtime, batch), runtime
    networks = {name: _one(view, name, batch) for name in available(model, batch)}
    times = medians(networks, images_like(model, batch))
    best = min(times, key=times.__getitem__)
    return networks[best], best


def available(model: nn.Module, batch: int) -> list[str]:
    """Return the runtimes that the gated `model` has for `batch` images at a time."""
    return ["masked", *(["gather"] if batch == 1 else []), *(["buckets"] if hasattr(model, NAME) else [])]


def dense(model: nn.Module, batch: int = 1) -> nn.Module:
    """Return the gated `model`, **changed in place**, without its gates: a runtime is to be faster than this."""
    if hasattr(model, NAME):
        delattr(model, NAME)
    drop_norms(model)
    ones = {name: torch.ones_like(layer.gate.excite.bias.detach()) for name, layer in gated_layers(model)}
    plain = remove_gates(model, ones)
    return masked(plain, graph_of(plain), batch)


def masked(model: nn.Module, graph: Graph, batch: int = 1) -> nn.Module:
    """Return a copy of any network, which `graph` was traced from, for inference: batch norms folded, in the layout
    that is faster for such batches.
    """
    folded, _ = fold_batch_norms(model, graph)
    return in_best_layout(folded, images_like(model, batch))


def medians(networks: Mapping[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Return the median seconds of a forward pass of each network."""
    runs = {name: partial(network, images) for name, network in networks.items()}
    times = in_turns(runs, images.device, rounds=_TIMINGS)
    return {name: statistics.median(values) for name, values in times.items()}


def images_like(model: nn.Module, batch: int) -> Tensor:
    """Return random images of the shape a network reads, `(batch, C, H, W)`, channels-last, the same each time."""
    origin, like = origin_of(model), next(model.parameters())
    shape = origin.input.shape if origin and origin.input else ()
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(like)
    return images.contiguous(memory_format=torch.channels_last)


def _one(view: GatedView, runtime: str, batch: int) -> nn.Module:
    model = view.model
    if runtime == "gather":
        return gathered(view, images_like(model, 1))
    if runtime == "buckets":
        runner = bucketed(model)
        part = images_like(model, max(1, batch // len(runner.networks)))
        runner.networks = nn.ModuleList(in_best_layout(network, part) for network in runner.networks)
        return runner
    return masked(model, view.graph, batch)
