"""Application of a plan, which gives a new network. Nothing else in prunekit changes a tensor's shape.

First the folds, at full width; then the removal, which is an index along each dimension of each parameter, and of
residual blocks that go as a whole; then the refits; then the gates. The caller's network is never touched: a failed
edit leaves nothing half done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from prunekit.errors import SurgeryError
from prunekit.nn.attention import count_heads, free_all
from prunekit.nn.channels import ChannelSelect, SelectedNorm
from prunekit.nn.gated import insert_gates
from prunekit.plan import Plan
from prunekit.surgery.copying import copied, named_tensors, without_collection
from prunekit.surgery.editing import attributes
from prunekit.surgery.editing.compensation import folded
from prunekit.surgery.editing.numbers import follow_widths
from prunekit.surgery.editing.skipping import silenced, skip_blocks, with_blocks
from prunekit.surgery.execution.dispatch import empty
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.labels import Ids, Mask
from prunekit.surgery.graph.resolved import resolve


def edit(model: nn.Module, plan: Plan, graph: Graph) -> nn.Module:
    """Return a copy of `model` with `plan` applied; `graph` is what `trace` read from the same network.

    Raises:
        SurgeryError: the plan does not fit the network.
    """
    with without_collection(), torch.inference_mode(False), torch.no_grad():
        resolved = resolve(graph, plan)
        kept, indices = resolved.kept, resolved.indices
        changed = folded(model, resolved)
        if resolved.skipped:  # these go as a whole
            kept = with_blocks(resolved)
            indices, changed = graph.kept_indices(kept), changed | silenced(model, resolved, changed)
        small = remove(model, graph, kept, changed, indices)
        skip_blocks(small, resolved)
        follow_widths(model, small, graph, kept)
        refit(small, plan)
        _keep_scale(small, graph, resolved.kept, resolved.indices)
        insert_gates(small, plan.gates)
    return small


def _keep_scale(small: nn.Module, graph: Graph, kept: Mask, indices: Mapping[tuple[str, int], Ids]) -> None:
    """Let narrower queries make up for the factor of the scores that the code computes from their width."""
    tensors = named_tensors(small)
    for number, width in enumerate(graph.inside.widths if graph.inside else ()):
        queries = width.sides.get("queries")
        if queries is None or not width.power:
            continue
        assert graph.inside is not None
        share = float(graph.inside.left(number, kept).mean())
        for module, attribute in width.scales if share < 1 else ():
            owner = small.get_submodule(module)
            attributes.set_numbers(owner, {attribute: getattr(owner, attribute) * share**width.power})
        for (name, dim), classes in graph.slots.items():
            if share == 1 or graph.roles[name, dim] == "in" or not np.isin(classes, queries).any():
                continue
            left = classes[indices[name, dim]]
            places = torch.from_numpy(np.flatnonzero(np.isin(left, queries))).to(tensors[name].device)
            tensors[name].data.index_copy_(
                dim, places, tensors[name].data.index_select(dim, places) * share**-width.power
            )


def remove(
    model: nn.Module,
    graph: Graph,
    kept: Mask,
    changed: Mapping[str, Tensor] | None = None,
    indices: Mapping[tuple[str, int], Ids] | None = None,
) -> nn.Module:
    """Return a copy of `model` without the channels whose class is not `kept`.

    `changed` holds new full-width values for some parameters and buffers, or for biases that do not exist yet.
    `indices` are those of the parameters that stay, where not all of `kept` is to be followed.
    """
    changed = changed or {}
    indices = graph.kept_indices(kept) if indices is None else indices
    tensors = named_tensors(model)
    small = copied(
        model,
        {
            id(tensors[name]): _cut(tensors[name], changed.get(name), dims)
            for name, dims in _by_parameter(indices, changed, tensors).items()
        },
    )
    _make_biases(small, graph, changed.keys() - tensors.keys(), changed, indices)
    free_all(small, {name for name, _ in indices})
    _fit_modules(small, graph, kept, {name for name, _ in indices})
    _select_channels(small, graph, kept)
    return small


def _by_parameter(
    indices: Mapping[tuple[str, int], Ids], changed: Iterable[str], tensors: Mapping[str, Tensor]
) -> dict[str, dict[int, Ids]]:
    """Return, for each parameter to be rebuilt, the indices that stay, by dimension."""
    result: dict[str, dict[int, Ids]] = {name: {} for name in changed if name in tensors}
    for (name, dim), index in indices.items():
        result.setdefault(name, {})[dim] = index
    return result


def _cut(tensor: Tensor, values: Tensor | None, dims: Mapping[int, Ids]) -> Tensor:
    result = (tensor if values is None else values).detach()
    for dim, index in dims.items():
        result = take(result, dim, index)
    if result.data_ptr() == tensor.data_ptr() and not tensor.is_meta:
        result = result.clone()
    result = _like_format(result, tensor)
    return nn.Parameter(result, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result


def take(tensor: Tensor, dim: int, index: Ids) -> Tensor:
    """Return the entries `index` along `dim`, zeros where it is -1."""
    if tensor.is_meta:
        return empty((*tensor.shape[:dim], index.size, *tensor.shape[dim + 1 :]), tensor)
    taken = tensor.index_select(dim, torch.from_numpy(np.maximum(index, 0)).to(tensor.device))
    blank = np.flatnonzero(index < 0)
    return taken.index_fill_(dim, torch.from_numpy(blank).to(tensor.device), 0) if blank.size else taken


def _like_format(result: Tensor, tensor: Tensor) -> Tensor:
    """Return `result` with its dimensions ordered in memory as those of `tensor`: channels-last stays that."""
    if tensor.is_contiguous():
        return result.contiguous()
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return result.permute(order).contiguous().permute([order.index(d) for d in range(tensor.dim())])


def _make_biases(
    small: nn.Module,
    graph: Graph,
    made: Iterable[str],
    changed: Mapping[str, Tensor],
    indices: Mapping[tuple[str, int], Ids],
) -> None:
    for name in made:
        owner = name.rpartition(".")[0]
        stays = kept_outputs(graph, owner, indices)
        bias = changed[name] if stays is None else take(changed[name], 0, stays)
        module = small.get_submodule(owner)
        module.bias = nn.Parameter(bias, requires_grad=all(p.requires_grad for p in module.parameters()))


def kept_outputs(graph: Graph, module: str, indices: Mapping[tuple[str, int], Ids]) -> Ids | None:
    """Return the outputs that are left of the layer that `module` runs, None where it keeps all."""
    read = next(node.read for node in graph.nodes if node.module == module and node.read is not None)
    out = 1 - read.dim
    stays = indices.get((read.parameter, out))
    if stays is None or not (read.transposed and read.groups > 1):
        return stays
    width = graph.shapes[read.parameter][out]  # the outputs of one group
    return np.concatenate([np.where(stays < 0, -1, stays + group * width) for group in range(read.groups)])


def _fit_modules(small: nn.Module, graph: Graph, kept: Mask, parameters: Iterable[str]) -> None:
    modules = dict(small.named_modules(remove_duplicate=False))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    changed = set(parameters)
    touched = set()
    for name, known in _names(small):
        if known not in graph.shapes:  # a bias that a fold has made
            continue
        owner, _, leaf = name.rpartition(".")
        shapes.setdefault(owner, {})[leaf] = graph.shapes[known]
        if known in changed:
            touched.add(owner)
    for owner in touched:
        attributes.fit(modules[owner], shapes[owner])
    for name, (before, after) in graph.pads.items():
        attributes.write(modules[name], {"before": int(kept[before].sum()), "after": int(kept[after].sum())})
    for name, classes in graph.widths.items():
        _fit_norm(modules.get(name), int(kept[classes].sum()))
    for name, numbers in graph.numbers.items():
        new = {number: int(kept[classes].sum()) for number, classes in numbers.items() if not kept[classes].all()}
        if new:
            attributes.set_numbers(modules[name], attributes.with_counts(modules[name], new))
    count_heads(small)


def _names(small: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield every name of each parameter and buffer, with the one it is known by: tied weights have several."""
    first: dict[int, str] = {}
    for name, tensor in named_tensors(small, remove_duplicate=False).items():
        yield name, first.setdefault(id(tensor), name)


def _fit_norm(module: nn.Module | None, channels: int) -> None:
    """Set the width of a norm without a scale: it has no parameter that would tell it."""
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (channels,)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = channels
    elif isinstance(module, _NormBase):
        module.num_features = channels


def _select_channels(small: nn.Module, graph: Graph, kept: Mask) -> None:
    """Put a selection before each batch norm that lost channels of a stream, or narrow the one that stands there."""
    selected = {name.removesuffix(".select") + ".norm" for name in graph.selections}
    private = {link.norm: kept[link.private] for link in graph.links}
    for name, selection in graph.selections.items():
        stays = private.get(name.removesuffix(".select") + ".norm", kept[selection.inputs[selection.index]])
        _set_index(small.get_submodule(name), _renumber(kept[selection.inputs], selection.index[stays]))
    for link in graph.links:
        in_front, behind = kept[link.stream], kept[link.private]
        if link.norm not in selected and not np.array_equal(in_front, behind):
            norm = small.get_submodule(link.norm)
            index = torch.from_numpy(_renumber(in_front, np.flatnonzero(behind))).to(next(norm.buffers()).device)
            small.set_submodule(link.norm, SelectedNorm(norm, index).train(norm.training))


def _renumber(kept: Mask, places: Ids) -> Ids:
    """Return the new indices of `places` of a stream once only its `kept` channels are left."""
    return (np.cumsum(kept) - 1)[places]


def _set_index(select: nn.Module, index: Ids) -> None:
    assert isinstance(select, ChannelSelect)
    select.index = torch.from_numpy(index).to(select.index.device)


def refit(model: nn.Module, plan: Plan) -> None:
    """Write the values of the plan's refits into a network that has its final shape already.

    Raises:
        SurgeryError: no such layer or parameter, or values of another shape.
    """
    for operation in plan.refits:
        try:
            module = model.get_submodule(operation.layer)
        except AttributeError:
            raise SurgeryError(f"the plan refits '{operation.layer}', which the model does not have") from None
        for name, values in operation.values.items():
            target = getattr(module, name, None)
            if not isinstance(target, Tensor) or target.shape != values.shape:
                found = tuple(target.shape) if isinstance(target, Tensor) else "nothing"
                raise SurgeryError(
                    f"the plan refits '{operation.layer}.{name}' with shape {tuple(values.shape)}; it has {found}"
                )
            target.data.copy_(values)
