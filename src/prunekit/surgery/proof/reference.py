"""Reference for a pruned network: the original with its own weights, told that the removed inputs are gone.

Wherever an operation reads removed channels, the activation is replaced by what the plan claims that it is worth:
`x_r = A x_k + b` where a fold says so, zero elsewhere. The operation then runs as it is. So nothing here does what the
surgery does: weights are neither cut nor merged, and no bias is shifted. Refits are claims about weights: they are put
where the kept channels are. Queries of attention are not read through a weight: coordinates that are removed from them
are zeros. Layers that normalise across channels do so over the kept ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.devices import device_of
from prunekit.errors import SurgeryError
from prunekit.surgery.copying import aliases, copied, named_tensors
from prunekit.surgery.editing.editor import kept_outputs
from prunekit.surgery.execution.dispatch import op_name, unfused_attention
from prunekit.surgery.execution.draws import Draws, start_over
from prunekit.surgery.execution.hooks import running
from prunekit.surgery.execution.weights import FollowWeights, Key
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.labels import Ids
from prunekit.surgery.graph.resolved import ResolvedPlan
from prunekit.surgery.ops import Reading
from prunekit.surgery.proof.claims import Worth, worths


class Reference:
    """The original network, to be run as a plan means it; `network` is a copy that shares its weights."""

    def __init__(self, model: nn.Module, resolved: ResolvedPlan) -> None:
        graph, kept = resolved.graph, resolved.kept
        self.network = _with_refits(model, resolved)
        for name, module in model.named_modules():
            self.network.get_submodule(name).training = module.training
        self.worth = worths(model, resolved)
        self.norms = {
            _call_of(graph, index): kept[classes].nonzero()[0]
            for index, classes in graph.normalised.items()
            if index < len(graph.nodes) and not kept[classes].all()
        }
        self._resolved = resolved
        self._device = device_of(model)
        self._unseen: set[Any] = {key for key in _keys_read(graph) if key in self.worth} | set(self.norms)

    def run(self, inputs: tuple[Any, ...]) -> tuple[Any, Draws]:
        """Return the output, and the random numbers that were drawn on the way."""
        draws = Draws(self._resolved.graph.draws, self._resolved.kept, self._device)
        # which module runs is asked for norms alone
        modules = dict(self.network.named_modules()) if self.norms else {}
        start_over(self._device)
        # the fused inference path of transformer layers would hide what is read through their weights
        with running(modules) as stack, unfused_attention(), _AsMeant(self, draws, stack) as mode:
            output = self.network(*inputs)
        self._unseen -= mode.seen
        return output, draws

    def check_complete(self) -> None:
        """Raise if a place where removed channels are read has not been seen by now.

        Raises:
            SurgeryError: one was not, so that nothing is known of it.
        """
        for what in self._unseen:
            name = what[0] if len(what) == 2 else f"{what[1]}' in '{what[0]}"
            raise SurgeryError(
                f"the proof is not complete: '{name}' reads removed channels, but did not run on random inputs",
                hint="does the forward take another way for other values? Keep those channels",
            )


def _keys_read(graph: Graph) -> set[Key]:
    return {(node.read.parameter, node.read.dim) for node in graph.nodes if node.read is not None}


def _call_of(graph: Graph, index: int) -> tuple[str, str, int]:
    """Return a node as its module, its op, and its number among the calls of that op in there."""
    node = graph.nodes[index]
    before = sum(other.op == node.op and other.module == node.module for other in graph.nodes[:index])
    return node.module, node.op, before


def _with_refits(model: nn.Module, resolved: ResolvedPlan) -> nn.Module:
    """Return a copy of `model` on the same weights, but with the values of the plan's refits where they belong."""
    indices = resolved.indices
    tensors, changed = named_tensors(model), dict[str, Tensor]()
    made: dict[tuple[str, str], Tensor] = {}
    for operation in resolved.plan.refits:
        for leaf, values in operation.values.items():
            name = f"{operation.layer}.{leaf}" if operation.layer else leaf
            if name in tensors:
                full = changed.get(name, tensors[name].detach().clone())
                changed[name] = _put(full, values, [indices.get((name, d)) for d in range(full.dim())])
            else:  # a bias that a fold has made
                outputs = kept_outputs(resolved.graph, operation.layer, indices)
                size = values.numel() if outputs is None else int(max(outputs.max() + 1, values.numel()))
                made[operation.layer, leaf] = _put(values.new_zeros(size), values, [outputs])
    _silence_queries(resolved, tensors, changed)
    replaced: dict[int, Any] = dict(aliases(model))
    for name, values in changed.items():
        old = tensors[name]
        replaced[id(old)] = nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values
    reference = copied(model, replaced)
    for (layer, leaf), values in made.items():
        setattr(reference.get_submodule(layer), leaf, nn.Parameter(values))
    return reference


def _silence_queries(resolved: ResolvedPlan, tensors: Mapping[str, Tensor], changed: dict[str, Tensor]) -> None:
    """Put zeros where removed coordinates of queries are made: to scores these add nothing, then."""
    inside, kept = resolved.graph.inside, resolved.kept
    made = [width.sides["queries"].ravel() for width in (inside.widths if inside else ()) if "queries" in width.sides]
    silent = np.concatenate([*made, np.zeros(0, dtype=np.int64)])
    silent = silent[~kept[silent]]
    for (name, dim), classes in resolved.graph.slots.items() if silent.size else ():
        places = np.flatnonzero(np.isin(classes, silent))
        if places.size and resolved.graph.roles[name, dim] != "in":
            full = changed.get(name, tensors[name].detach().clone())
            changed[name] = full.index_fill(dim, torch.from_numpy(places).to(full.device), 0)


def _put(full: Tensor, values: Tensor, indices: list[Ids | None]) -> Tensor:
    """Return `full` with `values` where they come from; places that come from nowhere (-1) are left out."""
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


class _AsMeant(FollowWeights):
    """Mode that runs a forward of the reference, and replaces what is read through its weights."""

    def __init__(self, reference: Reference, draws: Draws, stack: list[str]) -> None:
        super().__init__(reference.network, reference.worth, draws)
        self._reference = reference
        self._stack = stack
        self._root = type(reference.network).__name__
        self._norms: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op as the plan means it."""
        op = op_name(func)
        if op not in _NORMS:
            return super().__torch_dispatch__(func, types, args, kwargs)
        where = self._stack[-1] if self._stack and self._stack[-1] else self._root
        call = (where, op, self._norms[where, op])
        self._norms[where, op] += 1
        kept = self._reference.norms.get(call)
        if kept is None:
            return func(*args, **(kwargs or {}))
        self.seen.add(call)
        return _NORMS[op](func, torch.from_numpy(kept).to(args[0].device), args)

    def read(self, func: Any, reading: Reading, args: Any, key: Key, line: Tensor) -> tuple[Any, Tensor | None]:
        """Replace what is read through a weight by what it is said to be worth."""
        worth, x, channels = self._reference.worth[key], args[reading.activation], reading.channels
        if op_name(func) != "convolution" or worth.constants is None:
            return _with(args, {reading.activation: worth.put(x, channels, line)}), None
        alone = replace(worth, constants=None).put(x, channels, line)
        return _with(args, {reading.activation: alone}), _of_constants(func, args, worth, line)


def _with(args: Any, new: Mapping[int, Any]) -> tuple[Any, ...]:
    return tuple(new.get(place, value) for place, value in enumerate(args))


def _of_constants(func: Any, args: Any, worth: Worth, line: Tensor) -> Tensor:
    """Return what a convolution makes of constants where no border is in reach, of one position.

    They are claimed to go on beyond the borders, where other channels are padded with zeros; a convolution of a sum
    is the sum of the convolutions.
    """
    x, weight, _, stride, _, dilation, transposed = args[:7]
    axes = x.dim() - 2
    assert not transposed or max(stride) == 1, "strided transposed convolutions carry no constants"
    reach = [d * (k - 1) for d, k in zip(_each(dilation, axes), weight.shape[2:], strict=True)]
    field = worth.put(x.new_zeros(1, x.size(1), *(r + 1 for r in reach)), 1, line)
    cropped = reach if transposed else [0] * axes
    made: Tensor = func(*_with(args, {0: field, 2: None, 4: cropped, 7: [0] * axes}))
    return made


def _each(setting: Any, axes: int) -> list[int]:
    return list(setting) * axes if len(setting) == 1 else list(setting)


def _layer_norm(func: Any, index: Tensor, args: Any) -> Any:
    x, _, weight, bias, eps = args
    if not index.numel():  # in a branch that goes: nothing reads it
        return torch.zeros_like(x), x, x
    scale, shift = (None if t is None else t[index] for t in (weight, bias))
    out, mean, rstd = func(x.index_select(-1, index), [index.numel()], scale, shift, eps)
    return torch.zeros_like(x).index_copy(-1, index, out), mean, rstd


def _group_norm(func: Any, index: Tensor, args: Any) -> Any:
    x, weight, bias, batch, _, positions, groups, eps = args
    if not index.numel():
        return torch.zeros_like(x), x, x
    scale, shift = (None if t is None else t[index] for t in (weight, bias))
    small = x.index_select(1, index).contiguous()
    out, mean, rstd = func(small, scale, shift, batch, index.numel(), positions, groups, eps)
    return torch.zeros_like(x).index_copy(1, index, out), mean, rstd


_NORMS = {"native_layer_norm": _layer_norm, "native_group_norm": _group_norm}
