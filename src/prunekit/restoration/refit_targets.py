"""Layers of a pruned network that can be refitted, and what must be known of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.plan import Plan
from prunekit.restoration.activations import activation_of
from prunekit.restoration.plain_layers import bias_of, obstacle_to_layer, reads, weight_of
from prunekit.restoration.streams import Join, find_join, private_norm
from prunekit.surgery import Graph, resolve
from prunekit.surgery.graph.labels import Ids
from prunekit.surgery.ops import LAYER_OPS, is_batch_norm


@dataclass(frozen=True)
class Site:
    """A layer to be refitted: the outputs it keeps (None for all), and where it adds into a residual stream.

    Its constant goes into its bias, if it has one, or else into the running mean of `norm`; `added_behind` says that
    another op adds the bias to what the layer's has given. Where nothing but activations read what it gives, behind its
    norm if it has one, all numbers up to `flat[0]` are alike to them, and all from `flat[1]` on.
    """

    layer: str
    kept: Tensor | None
    norm: str | None
    join: Join | None
    flat: tuple[float, float] | None = None
    added_behind: bool = False


def find_sites(model: nn.Module, graph: Graph, plan: Plan) -> tuple[list[Site], dict[str, str]]:
    """Return the layers whose inputs `plan` changes, in execution order; and those that cannot be refitted, and why."""
    kept = resolve(graph, plan).indices
    sites: list[Site] = []
    left: dict[str, str] = {}
    for name in _changed(graph, plan):
        weight = weight_of(name)
        reason = _obstacle(model, graph, name) or _blank(kept, weight)
        if reason is None:
            stays = kept.get((weight, 0))
            index = None if stays is None else torch.from_numpy(stays)
            norm = norm_behind(model, graph, name)
            flat, behind = _flat(model, graph, name, norm), reads(graph, name)[0].read
            added = behind is not None and behind.bias is None and bias_of(name) in graph.parameters
            sites.append(Site(name, index, norm, find_join(model, graph, name), flat, added))
        else:
            left[name] = reason
    return sites, left


def _changed(graph: Graph, plan: Plan) -> list[str]:
    """Return the convolutions and linear layers that lose inputs, or read what has passed through one that does.

    Those in residual blocks that go are none of them.
    """
    resolved = resolve(graph, plan)
    losing = {name for name, dim in resolved.indices if graph.roles[name, dim] == "in"}
    values: set[int] = set()
    layers: dict[str, None] = {}
    for node in graph.nodes:
        norm = graph.normalised.get(node.index)
        touched = not values.isdisjoint(node.inputs) or not losing.isdisjoint(node.parameters)
        if touched or (norm is not None and not resolved.kept[norm].all()):
            values.update(node.outputs)
            if node.op in LAYER_OPS:
                layers.update((p.rpartition(".")[0], None) for p in node.parameters if len(graph.shapes[p]) > 1)
    return [name for name in layers if not any(block.holds(name) for block in resolved.skipped)]


def _blank(kept: Mapping[tuple[str, int], Ids], weight: str) -> str | None:
    if any((kept[key] < 0).any() for key in ((weight, 0), (weight, 1)) if key in kept):
        return "it has places for channels that the original does not have"
    return None


def _obstacle(model: nn.Module, graph: Graph, name: str) -> str | None:
    reason = obstacle_to_layer(model, graph, name)
    return reason or (None if len(reads(graph, name)) == 1 else "it is used more than once")


def norm_behind(model: nn.Module, graph: Graph, layer: str) -> str | None:
    """Return the batch norm behind a layer, if it serves this layer alone and has a running mean to be shifted."""
    norm = graph.batch_norm_after(layer)
    alone = norm is not None and len({node.index for node in graph.calls(norm) if is_batch_norm(node.op)}) == 1
    return private_norm(model, graph, norm) if norm is not None and alone else None


def _flat(model: nn.Module, graph: Graph, layer: str, norm: str | None) -> tuple[float, float] | None:
    """Return the bounds past which all readers of a layer, behind its norm, see no difference; None without any."""
    node = reads(graph, layer)[0]
    if norm is not None:
        node = next(node for node in graph.calls(norm) if is_batch_norm(node.op))
    found = [activation_of(model, reader) for reader in graph.readers(node.outputs[0])]
    known = [activation for activation in found if activation is not None and activation.hides]
    if not known or len(known) < len(found):
        return None
    return min(one.low for one in known), max(one.high for one in known)
