"""Variation of each value of a network, as far as its batch norms tell: moments carried along the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit.restoration.activations import activation_of
from prunekit.restoration.gaussian import hermite
from prunekit.surgery import Graph
from prunekit.surgery.ops import AVERAGE_POOLS, COPIES, MAX_POOLS, is_batch_norm

_KEEP_MOMENTS = frozenset((*COPIES, "native_dropout", "constant_pad_nd", *AVERAGE_POOLS, *MAX_POOLS))  # near enough


def spreads(model: nn.Module, graph: Graph) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the mean and variance of each channel, `(C,)` both, for the values of the graph that batch norms tell of.

    Channels are Gaussian before an activation, and what an addition joins is independent; of an addend that nothing is
    known of, nothing is counted.
    """
    modules = dict(model.named_modules())
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for node in graph.nodes:
        known = [found[value] for value in dict.fromkeys(node.inputs) if value in found]
        result: tuple[Tensor, Tensor] | None = None
        activation = activation_of(model, node) if known else None
        if is_batch_norm(node.op) and node.parameters:
            result = _after_norm(modules.get(node.parameters[0].rpartition(".")[0]))
        elif node.op == "add" and known:
            width = max(len(mean) for mean, _ in known)
            whole = [pair for pair in known if len(pair[0]) == width]
            result = torch.stack([m for m, _ in whole]).sum(0), torch.stack([v for _, v in whole]).sum(0)
        elif activation is not None:
            terms, variance = hermite(known[0][1].sqrt(), known[0][0], activation.function)
            result = terms[0], variance
        elif node.op in _KEEP_MOMENTS and known:
            result = known[0]
        if result is not None and node.outputs:
            found[node.outputs[0]] = result
    return found


def _after_norm(norm: Any) -> tuple[Tensor, Tensor] | None:
    if not isinstance(norm, _BatchNorm) or norm.weight is None or norm.running_var is None:
        return None
    variance = norm.running_var.double().cpu()
    share = variance / (variance + norm.eps)
    return norm.bias.detach().double().cpu(), norm.weight.detach().double().cpu().square() * share
