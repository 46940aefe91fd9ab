"""Which layers of a pruned network can be refitted, and what must be known of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.plan import Plan
from prunekit.restore.samples import Layer
from prunekit.restore.streams import Join, find_join, private_norm
from prunekit.surgery import Graph
from prunekit.surgery.graph import kept_after
from prunekit.surgery.labels import Ids
from prunekit.surgery.layer_rules import is_batch_norm

_OPS = ("convolution", "addmm", "mm")


@dataclass(frozen=True)
class Site:
    """A layer to be refitted: the outputs it keeps (None for all), and where it adds into a residual stream.

    Its constant goes into its bias, if it has one, or else into the running mean of `norm`. `rectified` says whether
    nothing but a ReLU reads what it gives, behind its norm if it has one.
    """

    layer: str
    kept: Tensor | None
    norm: str | None
    join: Join | None
    rectified: bool


def find_sites(model: nn.Module, graph: Graph, plan: Plan) -> tuple[list[Site], dict[str, str]]:
    """The layers whose inputs `plan` changes, in execution order; and those that cannot be refitted, why."""
    modules = dict(model.named_modules())
    kept = graph.kept_indices(kept_after(graph, plan))
    sites: list[Site] = []
    left: dict[str, str] = {}
    for name in _changed(graph, plan):
        weight = f"{name}.weight" if name else "weight"
        reason = _obstacle(graph, name, weight, modules.get(name)) or _blank(kept, weight)
        if reason is None:
            stays = kept.get((weight, 0))
            index = None if stays is None else torch.from_numpy(stays)
            norm = norm_behind(graph, name)
            sites.append(Site(name, index, norm, find_join(graph, name), _rectified(graph, name, norm)))
        else:
            left[name] = reason
    return sites, left


def _changed(graph: Graph, plan: Plan) -> list[str]:
    """The convolutions and linear layers that lose inputs, or read what has passed through one that does."""
    kept = kept_after(graph, plan)
    losing = {name for name, dim in graph.kept_indices(kept) if graph.roles[name, dim] == "in"}
    values: set[int] = set()
    layers: dict[str, None] = {}
    for node in graph.nodes:
        norm = graph.normalised.get(node.index)
        touched = not values.isdisjoint(node.inputs) or not losing.isdisjoint(node.parameters)
        if touched or (norm is not None and not kept[norm].all()):
            values.update(node.outputs)
            if node.op in _OPS:
                layers.update((p.rpartition(".")[0], None) for p in node.parameters if len(graph.shapes[p]) > 1)
    return list(layers)


def _blank(kept: Mapping[tuple[str, int], Ids], weight: str) -> str | None:
    if any((kept[key] < 0).any() for key in ((weight, 0), (weight, 1)) if key in kept):
        return "it has places for channels that the original does not have"
    return None


def _obstacle(graph: Graph, name: str, weight: str, module: nn.Module | None) -> str | None:
    if not isinstance(module, Layer) or weight not in graph.parameters:
        return f"a {type(module).__name__} cannot be refitted"
    if _uses(graph, name, _OPS.__contains__) != 1:
        return "it is used more than once"
    return None


def norm_behind(graph: Graph, layer: str) -> str | None:
    """The batch norm behind a layer, if it serves this layer alone and has a running mean to be shifted."""
    norm = graph.batch_norm_after(layer)
    return private_norm(graph, norm) if norm and _uses(graph, norm, is_batch_norm) == 1 else None


def _rectified(graph: Graph, layer: str, norm: str | None) -> bool:
    node = next(node for node in graph.calls(layer) if node.op in _OPS)
    if norm is not None:
        node = next(node for node in graph.calls(norm) if is_batch_norm(node.op))
    readers = graph.readers(node.outputs[0])
    return bool(readers) and all(reader.op == "relu" for reader in readers)


def _uses(graph: Graph, module: str, kind: Callable[[str], bool]) -> int:
    """In how many nodes a module does its work (one node may use several of its parameters)."""
    return len({node.index for node in graph.calls(module) if kind(node.op)})
