"""What a pruned network is held against: the original at full width, with the removed inputs masked.

Folds and refits are applied, and every consumer's weights on removed inputs are zero. Inputs are masked, not outputs:
an activation with `act(0) != 0` makes the two differ. Layers that normalise across channels do so over the kept ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from prunekit.plan import Plan
from prunekit.surgery.aliases import aliases
from prunekit.surgery.copying import copied
from prunekit.surgery.fold import folded
from prunekit.surgery.graph import Graph, kept_after
from prunekit.surgery.labels import Ids, Mask
from prunekit.surgery.meta import DispatchMode


def masked(model: nn.Module, plan: Plan, graph: Graph, *, spend: bool = False) -> nn.Module:
    """The reference: `model` at full width with folds and refits applied and removed inputs masked.

    With `spend` the weights of `model` itself may be masked, which saves their copies.
    """
    kept = kept_after(graph, plan)
    indices = graph.kept_indices(kept)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    changed = folded(model, plan, graph)
    _scatter_refits(plan, tensors, changed, indices)
    for key, classes in graph.slots.items():
        if graph.roles[key] == "in" and key in indices:
            name, dim = key
            values = changed.get(name, tensors[name].detach())
            values = values if spend or name in changed else values.clone()
            values.index_fill_(dim, torch.from_numpy((~kept[classes]).nonzero()[0]).to(values.device), 0.0)
            changed[name] = values
    replaced: dict[int, Any] = dict(aliases(model))
    for name in changed.keys() & tensors.keys():
        old = tensors[name]
        replaced[id(old)] = (
            nn.Parameter(changed[name], old.requires_grad) if isinstance(old, nn.Parameter) else changed[name]
        )
    reference = copied(model, replaced)
    for name in changed.keys() - tensors.keys():
        reference.get_submodule(name.rpartition(".")[0]).bias = nn.Parameter(changed[name])
    return reference


def _scatter_refits(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    changed: dict[str, Tensor],
    indices: Mapping[tuple[str, int], Ids],
) -> None:
    """Refits are given in the final shapes; the reference needs them at full width."""
    for operation in plan.refits:
        for leaf, values in operation.values.items():
            name = f"{operation.layer}.{leaf}" if operation.layer else leaf
            full = changed[name].clone() if name in changed else tensors[name].detach().clone()
            # a bias that a fold has made has the outputs of its layer's weight
            known = name if name in tensors else f"{operation.layer}.weight"
            changed[name] = _put(full, values, [indices.get((known, d)) for d in range(full.dim())])


def _put(full: Tensor, values: Tensor, indices: list[Ids | None]) -> Tensor:
    """`full` with `values` where they come from; places that come from nowhere (-1) are left out."""
    for dim, index in enumerate(indices):
        if index is not None and (index < 0).any():
            values = values.index_select(dim, torch.from_numpy(np.flatnonzero(index >= 0)).to(values.device))
    grid = [
        torch.arange(full.size(d)) if index is None else torch.from_numpy(index[index >= 0])
        for d, index in enumerate(indices)
    ]
    if full.dim():
        full[torch.meshgrid(*grid, indexing="ij")] = values.to(full)
    else:
        full.copy_(values)
    return full


class NormaliseKept(DispatchMode):
    """Lets layer and group norms of the reference normalise over the kept channels only."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        super().__init__()
        kept = kept_after(graph, plan)
        norms = [n for n in graph.nodes if n.op in ("native_layer_norm", "native_group_norm")]
        self._masks: list[Mask | None] = []
        for node in norms:
            known = graph.normalised.get(node.index)
            mask = None if known is None else kept[known]
            self._masks.append(None if mask is None or mask.all() else mask)
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the norms that lost channels; run everything else as it is."""
        name = func._schema.name
        if name in ("aten::native_layer_norm", "aten::native_group_norm"):
            mask = self._masks[self._next] if self._next < len(self._masks) else None
            self._next += 1
            if mask is not None:
                index = torch.from_numpy(mask.nonzero()[0]).to(args[0].device)
                return (_layer_norm if name == "aten::native_layer_norm" else _group_norm)(func, index, args)
        return func(*args, **(kwargs or {}))


def _layer_norm(func: Any, index: Tensor, args: Any) -> Any:
    x, _, weight, bias, eps = args
    scale, shift = (None if t is None else t[index] for t in (weight, bias))
    out, mean, rstd = func(x.index_select(-1, index), [index.numel()], scale, shift, eps)
    return torch.zeros_like(x).index_copy(-1, index, out), mean, rstd


def _group_norm(func: Any, index: Tensor, args: Any) -> Any:
    x, weight, bias, batch, _, positions, groups, eps = args
    scale, shift = (None if t is None else t[index] for t in (weight, bias))
    small = x.index_select(1, index).contiguous()
    out, mean, rstd = func(small, scale, shift, batch, index.numel(), positions, groups, eps)
    return torch.zeros_like(x).index_copy(1, index, out), mean, rstd


def enliven(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """A copy whose outputs follow its inputs, whatever state the weights of `model` are in.

    Weights that are all zero get random values, and batch norms the statistics of what they see, so that the signal
    neither dies nor drowns in biases on its way.
    """
    lively = copied(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lively.named_parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values / max(parameter.shape[1:].numel(), 1) ** 0.5)
        elif name.endswith("bias"):
            parameter.mul_(0.1)
    norms = [m for m in lively.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    handles = [norm.train().register_forward_pre_hook(_take_statistics) for norm in norms]
    lively(*inputs)
    for handle in handles:
        handle.remove()
    return lively.eval()


def _take_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Set a batch norm's running statistics to those of its input, and let it use them."""
    x = args[0]
    over = [d for d in range(x.dim()) if d != 1]
    norm.running_mean.copy_(x.mean(over))  # type: ignore[operator]
    norm.running_var.copy_(x.var(over, unbiased=False).clamp_min(1e-12))  # type: ignore[operator]
    norm.eval()
